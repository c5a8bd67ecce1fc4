//go:build !linux

package main

import "context"

// becomeSubreaper does nothing: elsewhere orphans go to the system's first process, which waits for them.
func becomeSubreaper() error { return nil }

// run has nothing to do but to wait for the end of ctx.
func (r *reaper) run(ctx context.Context) { <-ctx.Done() }
