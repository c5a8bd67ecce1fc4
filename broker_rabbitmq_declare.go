package main

// broker_rabbitmq_declare.go says what the queues and exchanges are. What exists already is used as it is: a
// declaration that differs closes its channel, so each connection has one channel for that alone.

import (
	"fmt"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// maxRabbitName is the length of an AMQP short string: the library breaks the connection over a longer one.
const maxRabbitName = 255

var errRabbitName = fmt.Errorf("the name is longer than the %d bytes that AMQP allows", maxRabbitName)

// A rabbitQueue is a queue that is consumed here.
type rabbitQueue struct {
	name     string // "": one of the worker's own, named by the broker
	durable  bool   // else it is deleted with its last consumer
	exchange string // it is bound to; "": none
	key      string // of that binding
	fanout   string // an exchange that it needs, declared if it is missing; "": none
}

// jobQueue is where a job's tasks wait.
func (b *rabbitBroker) jobQueue(subject string) rabbitQueue {
	return rabbitQueue{name: subject, durable: true, exchange: b.config.Exchange, key: subject}
}

// workerQueue is for messages to whoever runs a task; nobody needs them when that is nobody.
func (b *rabbitBroker) workerQueue(subject string) rabbitQueue {
	return rabbitQueue{name: subject, exchange: b.config.Exchange, key: subject}
}

// ownQueue is this worker's share of what is for all workers.
func (b *rabbitBroker) ownQueue(subject string) rabbitQueue {
	return rabbitQueue{exchange: b.broadcastExchange(), key: subject, fanout: b.broadcastExchange()}
}

func (b *rabbitBroker) broadcastExchange() string { return b.project + ".broadcast" }

// declare makes sure that a queue is there and bound, and gives its name. asItIs is why it could not be had as it
// should be, where one of that name serves.
func (c *rabbitConn) declare(q rabbitQueue, noTransient bool) (name string, asItIs, err error) {
	if len(q.name) > maxRabbitName {
		return "", nil, errRabbitName
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if q.fanout != "" {
		err := c.do(func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare(q.fanout, amqp.ExchangeFanout, true, false, false, false, nil)
		})
		if err != nil && rabbitCode(err) != amqp.PreconditionFailed && rabbitCode(err) != amqp.AccessRefused {
			return "", nil, err
		}
		asItIs = err // the binding tells whether it serves
	}
	exclusive := q.name == ""
	err = c.do(func(ch *amqp.Channel) error {
		declared, err := ch.QueueDeclare(q.name, q.durable || noTransient && !exclusive, !q.durable, exclusive, false, nil)
		name = declared.Name
		return err
	})
	switch code := rabbitCode(err); {
	case code == amqp.PreconditionFailed, code == amqp.AccessRefused && !exclusive:
		asItIs, name = err, q.name
		err = c.do(func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclarePassive(q.name, q.durable, !q.durable, false, false, nil)
			return err
		})
		if err != nil {
			return "", nil, asItIs // the first refusal is the one to mend
		}
	case err != nil:
		return "", nil, err
	}
	if q.exchange != "" {
		err = c.do(func(ch *amqp.Channel) error { return ch.QueueBind(name, q.key, q.exchange, false, nil) })
		if rabbitCode(err) == amqp.AccessRefused && !exclusive {
			asItIs, err = err, nil // whoever made the queue may have bound it
		}
	}
	return name, asItIs, err
}

// plain reports whether a queue may be declared together with others.
func (q rabbitQueue) plain() bool {
	return q.name != "" && q.fanout == "" && len(q.name) <= maxRabbitName
}

// declareTogether makes sure that plain queues are there as they should be, and bound, with one wait for the broker. An
// error says nothing about each.
func (c *rabbitConn) declareTogether(queues []rabbitQueue, noTransient bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.do(func(ch *amqp.Channel) error {
		for i, q := range queues {
			noWait := i < len(queues)-1
			if _, err := ch.QueueDeclare(q.name, q.durable || noTransient, !q.durable, false, noWait || q.exchange != "", nil); err != nil {
				return err
			}
			if q.exchange == "" {
				continue
			}
			if err := ch.QueueBind(q.name, q.key, q.exchange, noWait, nil); err != nil {
				return err
			}
		}
		return nil
	})
}

// declareExchange makes sure that the exchange for jobs and events is there: as it is, or as a durable topic exchange.
func (c *rabbitConn) declareExchange(name string) error {
	err := c.lookAtExchange(name)
	if rabbitCode(err) != amqp.NotFound {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err = c.do(func(ch *amqp.Channel) error {
		return ch.ExchangeDeclare(name, amqp.ExchangeTopic, true, false, false, false, nil)
	})
	if err != nil {
		return failHint(codeRabbitExchange, fmt.Sprintf("declare exchange %q in virtual host %q of rabbitmq at %s", name, c.vhost, c.addr),
			err, "declare it by hand, or let the user configure it (rabbitmqctl set_permissions)")
	}
	return nil
}

// lookAtExchange asks whether an exchange exists; "" is the default exchange, which always does.
func (c *rabbitConn) lookAtExchange(name string) error {
	if name == "" {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.do(func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(name, amqp.ExchangeTopic, true, false, false, false, nil)
	})
	if err != nil {
		return fail(codeRabbitExchangeLook, fmt.Sprintf("look for exchange %q in virtual host %q of rabbitmq at %s", name, c.vhost, c.addr), err)
	}
	return nil
}

// do makes one call on the channel for declarations, with mu held. A refusal closes that channel, and the next call
// opens another.
func (c *rabbitConn) do(f func(*amqp.Channel) error) error {
	if c.declaring == nil || c.declaring.IsClosed() {
		channel, err := c.open()
		if err != nil {
			return err
		}
		c.declaring = channel
	}
	err := c.call(func() error { return f(c.declaring) })
	if err != nil && !c.IsClosed() {
		// The answer to close is the broker's last word on the channel; without it the next call might meet it.
		_ = c.call(c.declaring.Close)
		c.declaring = nil
	}
	return err
}

// refusesTransient tells whether the broker has closed the connection because a shared queue was not durable, which
// RabbitMQ 4.3 and later do not permit unless told to (deprecated feature transient_nonexcl_queues).
func refusesTransient(err error) bool {
	return rabbitCode(err) == amqp.InternalError && strings.Contains(err.Error(), "transient_nonexcl_queues")
}
