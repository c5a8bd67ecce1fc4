package main

// broker_rabbitmq_publish.go sends messages and knows which of them RabbitMQ has: one channel with publisher confirms,
// everything of a call on its way before the first confirm is waited for.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"
)

// A rabbitPublisher is a channel in confirm mode. Its goroutine learns which messages came back and why it ended.
type rabbitPublisher struct {
	conn    *rabbitConn
	channel *amqp.Channel

	returnsSeen chan struct{} // received from once every return before now is in unroutable
	done        chan struct{} // closed when the channel has ended
	why         error         // to be read after done

	mu         sync.Mutex // guards what follows
	lastID     uint64
	unroutable map[string]bool // the tasks that are being published, by message id: whether they came back
}

// openPublisher gives a publisher that is open on conn, a new one if need be.
func (b *rabbitBroker) openPublisher(conn *rabbitConn) (*rabbitPublisher, error) {
	b.mu.Lock()
	p := b.publisher
	b.mu.Unlock()
	if p != nil && p.conn == conn && !p.channel.IsClosed() {
		return p, nil
	}
	if err := conn.declareExchange(b.config.Exchange); err != nil {
		return nil, err
	}
	channel, err := conn.open()
	if err == nil {
		err = conn.call(func() error { return channel.Confirm(false) })
	}
	if err != nil {
		return nil, fail(codeRabbitPublisher, "open a channel for events to rabbitmq at "+conn.addr, err)
	}
	p = &rabbitPublisher{
		conn: conn, channel: channel, returnsSeen: make(chan struct{}), done: make(chan struct{}), unroutable: map[string]bool{},
	}
	// Unbuffered: once the library has handed a return over, it is this goroutine's, and only then the confirm follows.
	returns := channel.NotifyReturn(make(chan amqp.Return))
	closing := channel.NotifyClose(make(chan *amqp.Error, 1))
	if !b.own(func() { p.follow(returns, closing) }) { // ends with the channel
		conn.socket.Close()
		return nil, net.ErrClosed
	}
	b.mu.Lock()
	b.publisher = p // another call may have opened one as well; that serves until its messages are confirmed
	b.mu.Unlock()
	return p, nil
}

func (p *rabbitPublisher) follow(returns <-chan amqp.Return, closing <-chan *amqp.Error) {
	defer close(p.done)
	for {
		select {
		case returned, open := <-returns:
			if !open {
				returns = nil
				continue
			}
			p.mu.Lock()
			if _, waiting := p.unroutable[returned.MessageId]; waiting {
				p.unroutable[returned.MessageId] = true
			}
			p.mu.Unlock()
		case p.returnsSeen <- struct{}{}:
		case err := <-closing:
			if err != nil {
				p.why = err
			}
			return
		}
	}
}

// Publish sends everything as persistent: a queue that outlives the broker's restart is to hold what it held before. An
// event that no queue takes is dropped by the broker, a task then is an error. While the broker is short of memory or
// disk Publish fails at once; what was sent before waits for it.
func (b *rabbitBroker) Publish(ctx context.Context, messages ...Message) (sent int, err error) {
	return b.publishTo(ctx, b.config.Exchange, messages)
}

func (b *rabbitBroker) publishTo(ctx context.Context, exchange string, messages []Message) (sent int, err error) {
	conn := b.publishing.current()
	if conn == nil {
		return 0, fail(codeRabbitAway, "publish to rabbitmq", errors.New("not connected"))
	}
	if reason := conn.blocked.Load(); reason != nil {
		return 0, failHint(codeRabbitBlocked, "publish to rabbitmq at "+conn.addr, fmt.Errorf("the broker takes nothing: %s", *reason),
			"free memory or disk on the broker's host (rabbitmq-diagnostics alarms)")
	}
	p, err := b.openPublisher(conn)
	if err != nil {
		return 0, err
	}
	confirms, failed := p.send(ctx, exchange, messages)
	defer p.forget(confirms)
	for i, c := range confirms {
		if err := p.confirmed(ctx, c); err != nil {
			return i, fail(codeRabbitPublish, fmt.Sprintf("publish %q to rabbitmq at %s", messages[i].Subject, conn.addr), err)
		}
	}
	if failed != nil {
		return len(confirms), fail(codeRabbitSend, fmt.Sprintf("send %q to rabbitmq at %s", messages[len(confirms)].Subject, conn.addr), failed)
	}
	return len(messages), nil
}

// A rabbitConfirm is a message that is under way; id is set for a task.
type rabbitConfirm struct {
	*amqp.DeferredConfirmation
	id string
}

// send writes messages until one cannot be written.
func (p *rabbitPublisher) send(ctx context.Context, exchange string, messages []Message) (confirms []rabbitConfirm, err error) {
	confirms = make([]rabbitConfirm, 0, len(messages))
	err = p.conn.write(ctx, func() error {
		for _, m := range messages {
			if len(m.Subject) > maxRabbitName {
				return errRabbitName
			}
			c := rabbitConfirm{}
			out := amqp.Publishing{DeliveryMode: amqp.Persistent, ContentType: contentType(m), Body: m.Data}
			if m.Task {
				c.id = p.expect()
				out.MessageId = c.id
			}
			var err error
			if c.DeferredConfirmation, err = p.channel.PublishWithDeferredConfirm(exchange, m.Subject, m.Task, false, out); err != nil {
				p.forget([]rabbitConfirm{c})
				return err
			}
			confirms = append(confirms, c)
		}
		return nil
	})
	return confirms, err
}

func contentType(m Message) string {
	if m.Task || len(m.Data) > 0 && m.Data[0] == '{' {
		return amqp.MimeApplicationJSON
	}
	return amqp.MimeTextPlain
}

// confirmed waits until the broker has a message, or says why it does not.
func (p *rabbitPublisher) confirmed(ctx context.Context, c rabbitConfirm) error {
	select {
	case <-c.Done():
	case <-ctx.Done():
		return fmt.Errorf("not confirmed: %w", context.Cause(ctx))
	}
	if !c.Acked() {
		if !p.channel.IsClosed() {
			return errors.New("the broker could not store it (basic.nack)")
		}
		<-p.done
		if p.why != nil {
			return fmt.Errorf("not confirmed: %w", p.why)
		}
		return errors.New("not confirmed before the connection was closed")
	}
	if c.id == "" {
		return nil
	}
	select {
	case <-p.returnsSeen: // a return comes before its confirm
	case <-p.done:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unroutable[c.id] {
		return failHint(codeRabbitUnrouted, "deliver a task", errors.New("no queue takes it"),
			"start a worker that has the job, so that its queue exists")
	}
	return nil
}

// expect begins to note whether a task comes back, under the id that it returns.
func (p *rabbitPublisher) expect() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lastID++
	id := strconv.FormatUint(p.lastID, 10)
	p.unroutable[id] = false
	return id
}

func (p *rabbitPublisher) forget(confirms []rabbitConfirm) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range confirms {
		delete(p.unroutable, c.id)
	}
}
