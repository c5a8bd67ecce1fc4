package main

// broker_rabbitmq_link.go keeps one connection to RabbitMQ: it dials for ever, one server after another, makes the
// connection prove now and then that the broker still answers, and hands it to whoever needs one.

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// A rabbitLink is a connection that comes back.
type rabbitLink struct {
	broker  *rabbitBroker
	purpose string
	prepare func(*rabbitConn) error // what must be there before the connection counts as made

	state error // guarded by broker.reporting: nil is connected

	mu      sync.Mutex // guards what follows
	conn    *rabbitConn
	arrived chan struct{} // closed when conn is set
}

func newRabbitLink(b *rabbitBroker, purpose string, prepare func(*rabbitConn) error) *rabbitLink {
	return &rabbitLink{
		broker: b, purpose: purpose, prepare: prepare, state: errRabbitConnecting, arrived: make(chan struct{}),
	}
}

// keep connects and holds the connection, again and again, until the broker is closed.
func (l *rabbitLink) keep() {
	b := l.broker
	servers := b.addresses()
	tries := 0
	for turn := 0; b.ctx.Err() == nil; turn++ {
		began := time.Now()
		err := l.connect(servers[turn%len(servers)])
		if b.ctx.Err() != nil {
			return
		}
		b.linkChanged(l, err)
		if time.Since(began) > maxReconnectPause+b.proveWithin {
			tries = 0 // it had been connected
		}
		if !b.pause(tries/len(servers), nil) {
			return
		}
		tries++
	}
}

// connect makes a connection and holds it until it is lost, which the error explains.
func (l *rabbitLink) connect(addr string) error {
	conn, err := l.broker.dial(l.broker.ctx, addr, l.purpose)
	if err != nil {
		return err
	}
	defer conn.close()
	if err := l.prepare(conn); err != nil {
		return err
	}
	l.set(conn)
	defer l.set(nil)
	l.broker.linkChanged(l, nil)
	return l.hold(conn)
}

// hold returns when the connection is lost, does not answer, or the broker is closed.
func (l *rabbitLink) hold(conn *rabbitConn) error {
	channel, err := conn.open()
	if err != nil {
		return l.lost(conn, err)
	}
	tick := time.NewTicker(l.broker.proveEvery)
	defer tick.Stop()
	for {
		select {
		case <-conn.gone:
			return l.lost(conn, conn.why)
		case <-l.broker.ctx.Done():
			return l.broker.ctx.Err()
		case <-tick.C:
			if conn.blocked.Load() != nil {
				continue
			}
			if err := conn.answers(channel); err != nil {
				return l.lost(conn, err)
			}
		}
	}
}

// lost explains the end of a connection, and learns from it what this broker cannot do.
func (l *rabbitLink) lost(conn *rabbitConn, err error) error {
	if err == nil {
		err = errors.New("closed")
	}
	if refusesTransient(err) && !l.broker.noTransient.Swap(true) {
		l.broker.log.Warn("this RabbitMQ permits no queues that are shared and not durable; the worker's own are durable now")
	}
	return failHint(codeRabbitLost, fmt.Sprintf("keep the connection to rabbitmq at %s", conn.addr), err,
		"nothing to do if the broker was restarted; else look into its log")
}

func (l *rabbitLink) set(conn *rabbitConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn = conn
	if conn != nil {
		close(l.arrived)
		return
	}
	l.arrived = make(chan struct{})
}

// current gives the connection, nil while there is none.
func (l *rabbitLink) current() *rabbitConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn
}

// wait waits for a connection; nil when the broker is closed or stop is.
func (l *rabbitLink) wait(stop <-chan struct{}) *rabbitConn {
	for {
		l.mu.Lock()
		conn, arrived := l.conn, l.arrived
		l.mu.Unlock()
		if conn != nil {
			return conn
		}
		select {
		case <-arrived:
		case <-stop:
			return nil
		case <-l.broker.ctx.Done():
			return nil
		}
	}
}
