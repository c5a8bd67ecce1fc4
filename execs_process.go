package main

// execs_process.go is child_execs_process: where it has its configuration from, what makes it stop, and what it tells
// its parent. What runs in it is execs.go's.

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// runExecs is child_execs_process: under a parent, or by hand.
func runExecs(ctx context.Context, inv *invocation) int {
	p := &execsProcess{orders: make(chan order), signals: make(chan os.Signal, 2), supervised: inv.supervised}
	var err error
	if inv.supervised {
		err = p.adopt(inv)
	} else {
		err = p.standAlone(ctx, inv)
	}
	if err != nil {
		return inv.failed(err)
	}
	return p.run()
}

// An execsProcess is the process around the execs.
type execsProcess struct {
	first      *Config // what it starts with
	log        *slog.Logger
	notify     func(notice) // tells the parent, if there is one
	orders     chan order   // closed when the parent is gone
	signals    chan os.Signal
	supervised bool
}

// adopt takes the configuration from the parent and follows its orders from then on.
func (p *execsProcess) adopt(inv *invocation) error {
	parent, err := joinParent(inv)
	if err != nil {
		return err
	}
	p.first, p.log, p.notify = parent.first.Config, parent.log, parent.notify
	signal.Notify(p.signals, syscall.SIGTERM)
	go func() { // ends with the process
		defer close(p.orders)
		for o, err := parent.first, error(nil); err == nil; err = parent.orders.next(&o) {
			p.orders <- o
			o = order{}
		}
	}()
	return nil
}

// standAlone is for execs without a parent. A changed configuration file is taken up as it is under one.
func (p *execsProcess) standAlone(ctx context.Context, inv *invocation) error {
	var err error
	if p.first, err = loadConfig(inv.configFile(), os.LookupEnv); err != nil {
		return err
	}
	p.log = newLogger(inv.stderr, p.first)
	p.notify = func(notice) {}
	sealDescriptors()
	signal.Notify(p.signals, os.Interrupt, syscall.SIGTERM)
	source := newConfigSource(p.first, os.LookupEnv, p.log)
	go source.run(ctx) // ends with the process
	go func() {        // ends with the process
		for update := range source.updates {
			if update.config != nil {
				p.orders <- order{Config: update.config}
			}
		}
	}()
	return nil
}

// run runs the execs until it is told to stop, and returns the exit code.
func (p *execsProcess) run() int {
	set := newExecSet(p.first.DataDir, p.first.KillAfter, standardExecPauses(), p.log)
	var stopped chan struct{} // nil: not stopping
	stop := func(reason string) {
		if stopped == nil {
			p.log.Info("execs are being stopped", "reason", reason)
			stopped = make(chan struct{})
			go func() { // ends when they are gone, which run waits for
				defer close(stopped)
				set.stop()
			}()
		}
	}
	killed := false
	kill := func(reason string) {
		if stop(reason); !killed {
			killed = true
			set.kill()
		}
	}
	alive := time.NewTicker(alivePause)
	defer alive.Stop()
	over := execsOver{}
	orders := p.orders
	for {
		select {
		case o, ok := <-orders:
			if !ok {
				orders = nil
				p.notify = func(notice) {}
				stop("the parent is gone")
				continue
			}
			// The manager gives the project that execs find in their environment.
			if o.Config != nil && !o.Pending && stopped == nil {
				setLogFormat(p.log, o.Config.LogFormat)
				set.apply(o.Config)
			}
			if o.Drain {
				stop("the parent says so")
			}
			if o.Kill {
				kill("the parent says so")
			}
		case sig := <-p.signals:
			if stopped == nil {
				stop(sig.String())
			} else {
				kill(sig.String())
			}
		case <-set.changed:
			health, now := set.report()
			p.notify(notice{Execs: health})
			if now != over && stopped == nil {
				p.notify(notice{Shutdown: true, Failed: now.failed})
				if !p.supervised {
					stop("an exec with cascade_exit has ended")
				}
			}
			over = now
		case <-alive.C:
			p.notify(notice{Alive: true})
		case <-stopped:
			health, _ := set.report()
			p.notify(notice{Execs: health})
			p.log.Info("execs stopped")
			if over.failed && !p.supervised {
				return exitFailed
			}
			return exitOK
		}
	}
}
