package main

// httpapi_shutdown.go is how the REST API begins and ends on a listener that others share. http.Server.Shutdown drops a
// connection whose first request it has not read yet; here such a request is answered, since the one who takes over will
// never see it.

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"
)

// firstRequestPatience is how long a connection that was just accepted may take to send its first request.
const firstRequestPatience = 2 * time.Second

// leaving knows the connections that have not asked for anything yet.
type leaving struct {
	mu       sync.Mutex // guards what follows
	listener net.Listener
	ended    chan struct{} // closed when nothing is accepted any more; nil: nothing ever was
	begun    bool          // of ending
	silent   map[net.Conn]bool
}

// connKey finds the connection of a request in its context.
type connKey struct{}

// arrived notes a new connection.
func (l *leaving) arrived(ctx context.Context, conn net.Conn) context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.silent == nil {
		l.silent = map[net.Conn]bool{}
	}
	l.silent[conn] = true
	return context.WithValue(ctx, connKey{}, conn)
}

// asked notes that a connection's request is being answered.
func (l *leaving) asked(r *http.Request) {
	if conn, ok := r.Context().Value(connKey{}).(net.Conn); ok {
		l.forget(conn)
	}
}

// changed notes the end of a connection.
func (l *leaving) changed(conn net.Conn, state http.ConnState) {
	if state == http.StateClosed || state == http.StateHijacked {
		l.forget(conn)
	}
}

func (l *leaving) forget(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.silent, conn)
}

// begin notes that listener is being served; false if the end has come already.
func (l *leaving) begin(listener net.Listener) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listener, l.ended = listener, make(chan struct{})
	return !l.begun
}

// end accepts no more, and waits until every connection has asked for something, or has had time to.
func (l *leaving) end(ctx context.Context) {
	l.mu.Lock()
	l.begun = true
	listener, ended := l.listener, l.ended
	l.mu.Unlock()
	if listener == nil {
		return
	}
	listener.Close()
	<-ended
	ctx, stop := context.WithTimeout(ctx, firstRequestPatience)
	defer stop()
	for l.anySilent() {
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
}

func (l *leaving) anySilent() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.silent) > 0
}

// serve answers requests on listener until shutdown, which makes it return nil.
func (a *apiServer) serve(listener net.Listener) error {
	going := a.leaving.begin(listener)
	defer close(a.leaving.ended)
	if !going {
		return listener.Close()
	}
	err := a.server.Serve(listener)
	a.leaving.mu.Lock()
	defer a.leaving.mu.Unlock()
	if a.leaving.begun || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fail(codeHTTPServe, "serve REST API on "+listener.Addr().String(), err)
}

// shutdown ends the answers that have no end of their own, lets the others finish until ctx ends, and closes what is
// left. The listener is closed at once.
func (a *apiServer) shutdown(ctx context.Context) error {
	a.feed.close()
	a.server.SetKeepAlivesEnabled(false)
	a.leaving.end(ctx)
	if err := a.server.Shutdown(ctx); err != nil {
		return a.server.Close()
	}
	return nil
}
