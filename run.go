package main

// run.go is `job_item run EVENT`: one task of a configured job, run here and now by a worker of its own that lives as
// long as the task. For trying a job out; it needs no running worker, no broker and no manager.

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

func runOnce(ctx context.Context, inv *invocation) int {
	if len(inv.args) != 1 {
		return inv.usageError("run takes one EVENT")
	}
	data, err := inv.taskData()
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	cfg, err := loadConfig(inv.configFile(), os.LookupEnv)
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	job := cfg.job(inv.args[0])
	if job == nil {
		inv.printError(failHint(codeRunEvent, "run", fmt.Errorf("no job has the event %q", inv.args[0]),
			"The configuration "+cfg.File+" has these: "+eventList(cfg)))
		return exitUsage
	}
	outcome, err := runTask(ctx, inv, cfg, job, data)
	if err != nil {
		inv.printError(err)
		return exitFailed
	}
	if outcome.Status != statusFinish && outcome.Error != "" {
		fmt.Fprintf(inv.stderr, "job_item: task ended with %s: %s\n", outcome.Status, outcome.Error)
	}
	return exitCodeOf(outcome.Status)
}

// exitCodeOf is how a command that followed a task exits.
func exitCodeOf(status taskStatus) int {
	switch status {
	case statusFinish:
		return exitOK
	case statusTimeout:
		return exitTimeout
	case statusTerminate:
		return exitTerminate
	default:
		return exitFailed
	}
}

func eventList(cfg *Config) string {
	list := ""
	for i, job := range cfg.Jobs {
		if i > 0 {
			list += ", "
		}
		list += job.Event
	}
	return list
}

// runTask runs a worker for one task, in a folder and on a port of its own. A signal terminates the task.
func runTask(ctx context.Context, inv *invocation, cfg *Config, job *Job, data json.RawMessage) (taskFinished, error) {
	var none taskFinished
	folder, err := os.MkdirTemp("", "job_item-run-")
	if err != nil {
		return none, fail(codeRunFolder, "make a folder for the task", err)
	}
	defer os.RemoveAll(folder)
	alone := *cfg
	alone.DataDir, alone.EndPoint, alone.Jobs, alone.Execs = folder, "", []Job{*job}, nil
	alone.Broker = BrokerConfig{Type: "local"}
	alone.TakeWhen = TakeWhen{}
	alone.Project = alone.Credential.ProjectID
	if os.Getenv("LOG_LEVEL") == "" {
		alone.LogLevel = slog.LevelError
	}
	log := newLogger(inv.stderr, &alone)

	listener, err := listen("127.0.0.1:0", bindPatience)
	if err != nil {
		return none, err
	}
	bus := &eventBus{}
	recs, err := openRecords(folder, alone.Retain)
	if err != nil {
		return none, err
	}
	defer recs.close()
	recs.setLog(log)
	bus.subscribe(recs.handle)
	bus.subscribe(logEvents(log))
	bus.subscribe(printOutput(inv.stdout))
	finished := make(chan taskFinished, 1)
	bus.subscribe(func(e event) {
		if end, ok := e.(taskFinished); ok {
			finished <- end
		}
	})

	w, err := newWorker(&alone, reachableURL(listener.Addr()), recs, bus, workerOrders{}, log)
	if err != nil {
		return none, err
	}
	api := newAPIServer(apiConfigOf(&alone), w, bus, log)
	api.serveRecords(recs)
	served := make(chan error, 1)
	go func() { served <- api.serve(listener) }() // ends at api.shutdown
	defer func() {
		api.shutdown(context.Background())
		<-served
	}()
	if err := w.open(ctx); err != nil {
		return none, err
	}
	defer w.close(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)

	id, err := w.create(ctx, "", job.Event, data)
	if err != nil {
		return none, err
	}
	for interrupted := false; ; interrupted = true {
		select {
		case end := <-finished:
			w.drain(context.Background())
			return end, nil
		case <-signals:
			if interrupted {
				w.killRunning()
			} else if err := w.terminate(ctx, id); err != nil {
				log.Debug("task not terminated", errAttrs(err))
			}
		}
	}
}

// printOutput copies every task's output to out.
func printOutput(out io.Writer) func(event) {
	var mu sync.Mutex // stdout and stderr of a command come from two goroutines
	return func(e event) {
		if piece, ok := e.(taskOutput); ok {
			mu.Lock()
			defer mu.Unlock()
			out.Write(piece.Data)
		}
	}
}
