//go:build linux

package main

// bench_brokers_test.go plays the Job Manager of the benchmark on each broker, with the brokers' own client libraries:
// it triggers tasks, hears what became of them, and measures what a message there and back takes without any worker.

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/redis/go-redis/v9"
)

const (
	benchEvent = "nothing" // the job whose tasks are counted
	benchEcho  = "p1.echo" // subject of tasks that echo answers, as a worker would that runs nothing

	// benchPatience is how long nothing may be heard of tasks before the rest of them count as lost.
	benchPatience = 30 * time.Second
)

// benchData is what tasks carry: 1 KiB.
var benchData = `{"text":"` + strings.Repeat("0123456789abcdef", 63) + `01234"}`

// A benchBroker is a broker that workers and the manager share.
type benchBroker struct {
	name       string
	connection string // value of broker_connection
	holds      bool   // tasks wait there and not in the worker
	open       func(t testing.TB) benchWire
	pid        int // of the server
}

// A benchWire is the manager's connection.
type benchWire interface {
	// send publishes tasks in the way that this broker keeps best, and returns when it has them.
	send(t testing.TB, subject string, messages ...string)
	// heard is the events that workers have published since the connection was opened.
	heard() <-chan benchHeard
	// echo answers tasks of benchEcho with their _finish.
	echo(t testing.TB)
}

type benchHeard struct {
	subject, data string
	at            time.Time
}

// hear is what a client library's callback does with an event.
func hear(events chan<- benchHeard, subject, data string) {
	events <- benchHeard{subject, data, time.Now()}
}

func newHeard() chan benchHeard { return make(chan benchHeard, 1<<16) }

// A benchServer is a kind of private server that may be installed.
type benchServer struct {
	program string
	start   func(t testing.TB) benchBroker
}

// benchServers are as they come. None serves two kinds: a stream would take what is sent plainly, too.
var benchServers = []benchServer{
	{"nats-server", func(t testing.TB) benchBroker { return onNATS(newNATSServer(t), "NATS", false) }},
	{"nats-server", func(t testing.TB) benchBroker {
		return onNATS(newNATSServer(t, "-js", "-sd", t.TempDir()), "NATS durable", true)
	}},
	{"rabbitmq-server", func(t testing.TB) benchBroker {
		s := newRabbitVHost(t)
		open := func(t testing.TB) benchWire { return openRabbitWire(t, s) }
		return benchBroker{"RabbitMQ", s.connection(), true, open, s.beam(t)}
	}},
	{"redis-server", func(t testing.TB) benchBroker {
		return onRedis(newRedisServer(t, "--appendonly", "no"), "Redis", false)
	}},
	{"redis-server", func(t testing.TB) benchBroker {
		return onRedis(newRedisServer(t, "--appendfsync", "everysec"), "Redis durable", true)
	}},
}

func (s benchServer) installed() bool {
	_, err := exec.LookPath(s.program)
	return err == nil
}

func onNATS(s *natsServer, name string, durable bool) benchBroker {
	open := func(t testing.TB) benchWire { return openNATSWire(t, s, durable) }
	return benchBroker{name, connectionOf(s, durable), durable, open, s.cmd.Process.Pid}
}

func onRedis(s *redisServer, name string, durable bool) benchBroker {
	open := func(t testing.TB) benchWire { return openRedisWire(t, s, durable) }
	return benchBroker{name, connectionOf(s, durable), durable, open, s.cmd.Process.Pid}
}

func connectionOf(s testServer, durable bool) string {
	if durable {
		return strings.TrimSuffix(s.connection(), "}") + ", durable: true}"
	}
	return s.connection()
}

// benchTask is the message that starts a task.
func benchTask(id string) string {
	return fmt.Sprintf(`{"task_id":%q,"data":%s,"action":"execute"}`, id, benchData)
}

// idIn reads the task's id of a message that benchTask has made.
func idIn(message string) string {
	_, rest, _ := strings.Cut(message, `"task_id":"`)
	id, _, _ := strings.Cut(rest, `"`)
	return id
}

type natsWire struct {
	nc     *nats.Conn
	js     nats.JetStreamContext // nil: published plainly
	events chan benchHeard
}

func openNATSWire(t testing.TB, s *natsServer, durable bool) benchWire {
	t.Helper()
	w := &natsWire{nc: s.client(t), events: newHeard()}
	// Events are subjects of one word, the tasks themselves are not.
	sub, err := w.nc.Subscribe("*", func(m *nats.Msg) { hear(w.events, m.Subject, string(m.Data)) })
	if err == nil {
		err = sub.SetPendingLimits(-1, -1)
	}
	if err == nil && durable {
		w.js, err = w.nc.JetStream(nats.PublishAsyncMaxPending(256))
	}
	if err == nil {
		err = w.nc.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *natsWire) heard() <-chan benchHeard { return w.events }

func (w *natsWire) send(t testing.TB, subject string, messages ...string) {
	t.Helper()
	for _, m := range messages {
		err := error(nil)
		if w.js != nil {
			_, err = w.js.PublishAsync(subject, []byte(m), nats.StallWait(benchPatience))
		} else {
			err = w.nc.Publish(subject, []byte(m))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if w.js == nil {
		if err := w.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		return
	}
	select {
	case <-w.js.PublishAsyncComplete():
	case <-time.After(benchPatience):
		t.Fatal("JetStream has not confirmed what was published")
	}
}

func (w *natsWire) echo(t testing.TB) {
	t.Helper()
	answer := func(m *nats.Msg) {
		w.nc.Publish(idIn(string(m.Data))+"_finish", []byte("finish"))
	}
	var err error
	if w.js == nil {
		_, err = w.nc.QueueSubscribe(benchEcho, "p1", answer)
	} else {
		w.js.DeleteStream("echo")
		_, err = w.js.AddStream(&nats.StreamConfig{
			Name: "echo", Subjects: []string{benchEcho}, Retention: nats.WorkQueuePolicy, Storage: nats.FileStorage,
		})
		if err == nil {
			_, err = w.js.Subscribe(benchEcho, func(m *nats.Msg) { answer(m); m.Ack() }, nats.ManualAck())
		}
	}
	if err == nil {
		err = w.nc.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
}

type rabbitWire struct {
	channel *amqp.Channel // publishes, with confirms
	server  *rabbitTestServer
	events  chan benchHeard
}

const rabbitExchange = "jobs" // the one in connection

func openRabbitWire(t testing.TB, s *rabbitTestServer) benchWire {
	t.Helper()
	w := &rabbitWire{channel: s.raw(t), server: s, events: newHeard()}
	listening := s.raw(t)
	queue, err := listening.QueueDeclare("", false, true, true, false, nil)
	if err == nil {
		err = listening.ExchangeDeclare(rabbitExchange, "topic", true, false, false, false, nil)
	}
	if err == nil {
		err = listening.QueueBind(queue.Name, "*", rabbitExchange, false, nil) // events are keys of one word
	}
	var deliveries <-chan amqp.Delivery
	if err == nil {
		deliveries, err = listening.Consume(queue.Name, "", true, true, false, false, nil)
	}
	if err == nil {
		err = w.channel.Confirm(false)
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the connection
		for d := range deliveries {
			hear(w.events, d.RoutingKey, string(d.Body))
		}
	}()
	return w
}

func (w *rabbitWire) heard() <-chan benchHeard { return w.events }

func (w *rabbitWire) send(t testing.TB, subject string, messages ...string) {
	t.Helper()
	var confirms []*amqp.DeferredConfirmation
	for _, m := range messages {
		confirm, err := w.channel.PublishWithDeferredConfirm(rabbitExchange, subject, false, false,
			amqp.Publishing{DeliveryMode: amqp.Persistent, Body: []byte(m)})
		if err != nil {
			t.Fatal(err)
		}
		confirms = append(confirms, confirm)
	}
	ctx, stop := context.WithTimeout(t.Context(), benchPatience)
	defer stop()
	for _, confirm := range confirms {
		if ok, err := confirm.WaitContext(ctx); err != nil || !ok {
			t.Fatalf("RabbitMQ has not confirmed what was published: %v", err)
		}
	}
}

func (w *rabbitWire) echo(t testing.TB) {
	t.Helper()
	channel := w.server.raw(t)
	_, err := channel.QueueDeclare(benchEcho, true, false, false, false, nil)
	if err == nil {
		err = channel.QueueBind(benchEcho, benchEcho, rabbitExchange, false, nil)
	}
	if err == nil {
		err = channel.Qos(8, 0, false)
	}
	var deliveries <-chan amqp.Delivery
	if err == nil {
		deliveries, err = channel.Consume(benchEcho, "", false, false, false, false, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the connection
		for d := range deliveries {
			channel.PublishWithContext(context.Background(), rabbitExchange, idIn(string(d.Body))+"_finish", false, false,
				amqp.Publishing{Body: []byte("finish")})
			d.Ack(false)
		}
	}()
}

type redisWire struct {
	server  *redisServer
	durable bool
	events  chan benchHeard
}

func openRedisWire(t testing.TB, s *redisServer, durable bool) benchWire {
	t.Helper()
	w := &redisWire{server: s, durable: durable, events: newHeard()}
	pubsub := s.client.PSubscribe(context.Background(), "*_who", "*_process", "*_finish")
	for range 3 {
		if _, err := pubsub.Receive(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { pubsub.Close() })
	go func() { // ends with the subscription
		for {
			m, err := pubsub.ReceiveMessage(context.Background())
			if err != nil {
				return
			}
			hear(w.events, m.Channel, m.Payload)
		}
	}()
	return w
}

func (w *redisWire) heard() <-chan benchHeard { return w.events }

func (w *redisWire) send(t testing.TB, subject string, messages ...string) {
	t.Helper()
	_, err := w.server.client.Pipelined(context.Background(), func(p redis.Pipeliner) error {
		for _, m := range messages {
			if w.durable {
				p.XAdd(context.Background(), &redis.XAddArgs{Stream: subject, Values: []any{"data", m}})
			} else {
				p.Publish(context.Background(), subject, m)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (w *redisWire) echo(t testing.TB) {
	t.Helper()
	ctx, client := t.Context(), w.server.client
	answer := func(message string) { client.Publish(ctx, idIn(message)+"_finish", "finish") }
	if !w.durable {
		pubsub := client.Subscribe(ctx, benchEcho)
		if _, err := pubsub.Receive(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pubsub.Close() })
		go func() { // ends with the subscription
			for {
				m, err := pubsub.ReceiveMessage(context.Background())
				if err != nil {
					return
				}
				answer(m.Payload)
			}
		}()
		return
	}
	client.Del(ctx, benchEcho)
	if err := client.XGroupCreateMkStream(ctx, benchEcho, "p1", "$").Err(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the measurement
		for ctx.Err() == nil {
			read, err := client.XReadGroup(ctx, &redis.XReadGroupArgs{
				Group: "p1", Consumer: "echo", Streams: []string{benchEcho, ">"}, Count: 8, Block: time.Second,
			}).Result()
			if err != nil {
				continue
			}
			for _, entry := range read[0].Messages {
				answer(fmt.Sprint(entry.Values["data"]))
				client.XAck(ctx, benchEcho, "p1", entry.ID)
			}
		}
	}()
}

// A benchManager triggers tasks on a worker and hears what becomes of them.
type benchManager interface {
	// send triggers n tasks of a job, numbered under a prefix, and returns when the broker has them.
	send(event, prefix string, n int)
	// await returns when all of them have ended, with the number of those that have not, and of which nothing was heard
	// for long.
	await(prefix string, n int) (lost int)
	// once triggers one task and gives when that was and when its end was heard, and what it printed.
	once(event, id string) (triggered, ended time.Time, output string)
	// trip is what a message there and back takes.
	trip(id string) time.Duration
}

// A brokerManager does so through a broker.
type brokerManager struct {
	t       testing.TB
	wire    benchWire
	echoing sync.Once
}

func (m *brokerManager) send(event, prefix string, n int) {
	m.t.Helper()
	messages := make([]string, n)
	for i := range messages {
		messages[i] = benchTask(fmt.Sprintf("%s-%d", prefix, i))
	}
	m.wire.send(m.t, "p1."+event, messages...)
}

func (m *brokerManager) await(prefix string, n int) (lost int) {
	m.t.Helper()
	ended := make([]bool, n)
	for left := n; left > 0; {
		select {
		case e := <-m.wire.heard():
			id, isEnd := strings.CutSuffix(e.subject, "_finish")
			number, isOurs := strings.CutPrefix(id, prefix+"-")
			if !isEnd || !isOurs {
				continue
			}
			i, err := strconv.Atoi(number)
			if err != nil || i >= n || e.data != "finish" {
				m.t.Errorf("%s: %s", e.subject, e.data)
				continue
			}
			if !ended[i] {
				ended[i] = true
				left--
			}
		case <-time.After(benchPatience):
			return left
		}
	}
	return 0
}

func (m *brokerManager) once(event, id string) (triggered, ended time.Time, output string) {
	return m.exchange("p1."+event, id)
}

func (m *brokerManager) trip(id string) time.Duration {
	m.echoing.Do(func() { m.wire.echo(m.t) })
	sent, back, _ := m.exchange(benchEcho, id)
	return back.Sub(sent)
}

// exchange sends one task and waits for its end.
func (m *brokerManager) exchange(subject, id string) (sent, ended time.Time, output string) {
	m.t.Helper()
	message := benchTask(id)
	sent = time.Now()
	m.wire.send(m.t, subject, message)
	for {
		select {
		case e := <-m.wire.heard():
			switch e.subject {
			case id + "_process":
				output += e.data
			case id + "_finish":
				return sent, e.at, output
			}
		case <-time.After(benchPatience):
			m.t.Fatalf("nothing was heard of task %s for %v", id, benchPatience)
		}
	}
}

// A localManager does so through the REST API, for the queue within the worker.
type localManager struct {
	t     testing.TB
	a     *agent
	ended int    // tasks, before those that are awaited
	last  string // the last of those
}

func (m *localManager) send(event, _ string, n int) {
	m.t.Helper()
	jobs := m.a.health().Jobs
	m.ended = jobs["finish"] + jobs["running"]
	m.a.createAll(m.t, event, n-1, 8)
	m.last = m.a.create(event, benchData)
}

// await follows the last task and only then asks what is left, since each time it asks costs about a quarter of a task.
func (m *localManager) await(_ string, n int) (lost int) {
	m.t.Helper()
	_, _ = m.follow(m.last) // where it does not end it is counted below
	left, heard := n, time.Now()
	for time.Since(heard) < benchPatience {
		now := m.ended + n - m.a.health().Jobs["finish"]
		if now <= 0 {
			return 0
		}
		if now < left {
			left, heard = now, time.Now()
		}
		time.Sleep(min(time.Millisecond+time.Since(heard)/10, 100*time.Millisecond)) // before it is asked again
	}
	return left
}

func (m *localManager) once(event, _ string) (triggered, ended time.Time, output string) {
	m.t.Helper()
	triggered = time.Now()
	output, err := m.follow(m.a.create(event, benchData))
	if err != nil {
		m.t.Fatal(err)
	}
	return triggered, time.Now(), output
}

// follow waits for a task's end, but not for ever, and gives what it printed.
func (m *localManager) follow(id string) (string, error) {
	ctx, stop := context.WithTimeout(m.t.Context(), 10*benchPatience)
	defer stop()
	req, err := http.NewRequestWithContext(ctx, "GET", m.a.url+"/job/"+id+"/log?follow=true", nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	printed, err := io.ReadAll(resp.Body)
	return string(printed), err
}

func (m *localManager) trip(string) time.Duration {
	began := time.Now()
	m.a.getJSON("/health", &struct{}{})
	return time.Since(began)
}
