package main

// child.go is the worker's process: where it has its configuration and socket from, in which order it starts, what
// makes it stop, and in which order it ends. The work itself is worker.go's.

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// runWorker is child_process: under a parent, or by hand.
func runWorker(ctx context.Context, inv *invocation) int {
	p := &workerProcess{
		stop: make(chan struct{}), kill: make(chan struct{}), configs: make(chan *Config, 1), supervised: inv.supervised,
	}
	var err error
	if inv.supervised {
		err = p.adopt(inv)
	} else {
		err = p.standAlone(ctx, inv)
	}
	if err != nil {
		return inv.failed(err)
	}
	if err := p.run(ctx); err != nil {
		p.log.Error("worker stopped", errAttrs(err))
		return exitFailed
	}
	return exitOK
}

// A workerProcess is the process around a worker.
type workerProcess struct {
	cfg      *Config // as it was at the start
	listener net.Listener
	api      *apiServer
	metrics  *metrics
	records  *records // nil until they could be opened
	log      *slog.Logger
	notify   func(notice) // tells the parent, if there is one
	reload   func()       // lets the configuration be asked for again

	supervised bool
	configs    chan *Config // complete ones; of several only the last is in it
	service    *serviceSlot

	stop     chan struct{} // closed when the worker is to drain
	kill     chan struct{} // closed when it is to end at once
	stopOnce sync.Once
	killOnce sync.Once
}

func (p *workerProcess) requestStop() { p.stopOnce.Do(func() { close(p.stop) }) }
func (p *workerProcess) requestKill() { p.killOnce.Do(func() { close(p.kill) }) }

// adopt takes configuration and socket from the parent and follows its orders from then on.
func (p *workerProcess) adopt(inv *invocation) error {
	parent, err := joinParent(inv)
	if err != nil {
		return err
	}
	first := parent.first
	p.cfg, p.log, p.notify = first.Config, parent.log, parent.notify
	p.reload = func() { p.notify(notice{Reload: true}) }
	if !first.Pending {
		p.offer(first.Config)
	}
	p.service = newServiceSlot(p.cfg)
	p.service.hear(first)
	if first.Listener {
		p.listener, err = inheritedSocket()
	} else {
		p.listener, err = listen(p.cfg.Listen, bindPatience)
	}
	if err != nil {
		return err
	}
	terminated := make(chan os.Signal, 2)
	signal.Notify(terminated, syscall.SIGTERM)
	go p.followSignals(terminated)   // ends with the process
	go p.followOrders(parent.orders) // ends with the parent
	return nil
}

// followOrders does what the parent says until it is gone.
func (p *workerProcess) followOrders(orders lineReader) {
	for {
		var o order
		if err := orders.next(&o); err != nil {
			if !p.stopping() {
				p.log.Warn("parent is gone, stopping")
				p.requestStop()
				// The next worker on this host needs the port, and no one else will close it.
				p.listener.Close()
			}
			return
		}
		if o.Config != nil {
			p.offer(o.Config)
		}
		p.service.hear(o)
		if o.Drain {
			p.requestStop()
		}
		if o.Kill {
			p.requestKill()
		}
	}
}

// standAlone is for a worker without a parent.
func (p *workerProcess) standAlone(ctx context.Context, inv *invocation) error {
	var err error
	if p.cfg, err = loadConfig(inv.configFile(), os.LookupEnv); err != nil {
		return err
	}
	p.log = newLogger(inv.stderr, p.cfg)
	p.service = newServiceSlot(p.cfg)
	p.notify = func(notice) {}
	if p.listener, err = listen(p.cfg.Listen, bindPatience); err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go p.followSignals(signals) // ends with the process
	source := newConfigSource(p.cfg, os.LookupEnv, p.log)
	p.reload = source.askAgain
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	go source.run(ctx)                 // ends with the process
	go p.followSource(source, hangups) // ends with the process
	return nil
}

// followSource is what a parent does with changes of the configuration.
func (p *workerProcess) followSource(source *configSource, hangups <-chan os.Signal) {
	for {
		select {
		case <-hangups:
			source.askAgain()
		case update := <-source.updates:
			p.service.hear(order{Problems: update.problems})
			switch next := update.config; {
			case next == nil:
			case next.Listen != p.cfg.Listen || next.DataDir != p.cfg.DataDir:
				p.log.Warn("listen or data_dir has changed; without a parent the configuration is taken up at the next start")
			default:
				p.offer(next)
			}
		}
	}
}

// offer hands a configuration to configure, in the place of one that it has not taken yet. It has one caller at a time.
func (p *workerProcess) offer(cfg *Config) {
	select {
	case <-p.configs:
	default:
	}
	p.configs <- cfg
}

// followSignals drains at the first signal and ends at once at the second.
func (p *workerProcess) followSignals(signals <-chan os.Signal) {
	<-signals
	p.requestStop()
	<-signals
	p.requestKill()
}

// run serves and works until it is told to stop. The REST API answers from the first moment; the worker begins when the
// configuration is complete.
func (p *workerProcess) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	bus := &eventBus{}
	bus.subscribe(logEvents(p.log))
	p.metrics = newMetrics(p.service, p.cfg)
	bus.subscribe(p.metrics.handle)
	processors := newProcessorLimit(os.LookupEnv)
	bus.subscribe(processors.handle)
	p.api = newAPIServer(apiConfigOf(p.cfg), p.service, bus, p.log)
	p.api.serveMetrics(p.metrics)
	served := make(chan error, 1)
	go func() { served <- p.api.serve(p.listener) }() // ends at api.shutdown
	configured := make(chan struct{})
	go func() { // ends with ctx
		defer close(configured)
		p.configure(ctx, bus)
	}()

	alive := time.NewTicker(alivePause)
	defer alive.Stop()
	garbage := newGarbageLimit(os.LookupEnv)
	var failed error
	for p.notify(p.aliveNotice()); !p.stopping() && failed == nil; {
		select {
		case <-alive.C:
			if w := p.service.filled.Load(); w != nil {
				w.makesProgress()
			}
			p.notify(p.aliveNotice())
			garbage.adjust()
			processors.adjust()
		case failed = <-served:
		case <-p.stop:
		}
	}
	cancel()
	<-configured

	urgent, hurry := context.WithCancel(context.Background())
	defer hurry()
	go func() { // ends with a kill order, or with the process
		<-p.kill
		hurry()
	}()
	w := p.service.filled.Load()
	if w != nil {
		w.drain(urgent)
	}
	grace, stop := context.WithTimeout(urgent, settleTimeout)
	defer stop()
	if err := p.api.shutdown(grace); err != nil {
		p.log.Warn("REST API not closed in time", errAttrs(err))
	}
	if w != nil {
		w.close(urgent)
	}
	if p.records != nil {
		p.records.close()
	}
	p.log.Info("worker stopped")
	return failed
}

// aliveNotice tells the parent how the worker is doing.
func (p *workerProcess) aliveNotice() notice {
	report := p.service.health()
	jobs := report.Jobs
	return notice{Alive: true, Pulse: &pulse{
		Status: report.Status, Running: jobs.Running, Ended: jobs.Finish + jobs.Error + jobs.Timeout + jobs.Terminate,
	}}
}

// configure makes the worker of the first complete configuration, and has it take up the later ones. What cannot be
// done is tried again: a file that it takes may have been mended.
func (p *workerProcess) configure(ctx context.Context, bus *eventBus) {
	var working sync.WaitGroup
	defer working.Wait()
	var w *worker
	var cfg *Config
	var again <-chan time.Time
	pause := minRestartPause
	for {
		select {
		case cfg = <-p.configs:
			again, pause = nil, minRestartPause
		case <-again:
		case <-ctx.Done():
			return
		}
		var err error
		if w != nil {
			p.metrics.reconfigure(cfg) // first: a new job's tasks may start at once
			if err = w.reconfigure(ctx, cfg); err != nil {
				p.metrics.reconfigure(w.config())
				p.log.Error("configuration not taken up, the one before stays", errAttrs(err))
				w.setProblem("configuration", codedText(err))
				continue
			}
			w.setProblem("configuration", "")
			p.api.reconfigure(apiConfigOf(cfg))
			continue
		}
		if w, err = p.newWorker(cfg, bus); err != nil {
			p.log.Error("worker cannot start yet", errAttrs(err), "pause", pause.String())
			p.service.explain(err)
			again = time.After(pause)
			pause = min(2*pause, maxRestartPause)
			continue
		}
		p.metrics.reconfigure(cfg)
		p.api.reconfigure(apiConfigOf(cfg))
		p.service.fill(w)
		working.Add(3)
		go func() { // ends with ctx
			defer working.Done()
			w.watchResources(ctx)
		}()
		reports := newHardware(cfg.DataDir, w.connection, w.connected, p.log)
		p.api.serveHardware(reports)
		go func() { // ends with ctx
			defer working.Done()
			w.awaitReady(ctx, hardwarePatience)
			reports.run(ctx)
		}()
		go func() { // ends when the worker is open, at the latest with ctx
			defer working.Done()
			if w.open(ctx) == nil {
				p.log.Info("ready", "addr", p.baseURL(), "jobs", len(w.config().Jobs), "pid", os.Getpid(),
					"try", suggestion(w.config()))
				p.notify(notice{Ready: true})
			}
		}()
	}
}

// newWorker opens what the worker needs, each as soon as it can be opened.
func (p *workerProcess) newWorker(cfg *Config, bus *eventBus) (*worker, error) {
	if p.records == nil {
		recs, err := openRecords(cfg.DataDir, cfg.Retain)
		if err != nil {
			return nil, err
		}
		recs.setLog(p.log)
		bus.subscribe(recs.handle)
		p.records = recs
		p.api.serveRecords(recs)
	}
	orders := workerOrders{reload: p.reload, shutdown: p.askForShutdown}
	return newWorker(cfg, p.baseURL(), p.records, bus, orders, p.log)
}

func (p *workerProcess) baseURL() string { return reachableURL(p.listener.Addr()) }

// askForShutdown lets the parent stop everything; without one this process is everything.
func (p *workerProcess) askForShutdown() {
	if p.supervised {
		p.notify(notice{Shutdown: true})
	} else {
		p.requestStop()
	}
}

// suggestion is a first thing to try for somebody who reads the log.
func suggestion(cfg *Config) string {
	if len(cfg.Jobs) == 0 {
		return "add a job to " + cfg.File
	}
	return fmt.Sprintf("job_item create %s --wait", cfg.Jobs[0].Event)
}

func (p *workerProcess) stopping() bool {
	select {
	case <-p.stop:
		return true
	default:
		return false
	}
}

// reachableURL is how a job on this host reaches the REST API that listens on addr.
func reachableURL(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return "http://" + addr.String()
	}
	host := tcp.IP.String()
	if tcp.IP == nil || tcp.IP.IsUnspecified() {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, fmt.Sprint(tcp.Port))
}
