package main

// threads.go owns the threads that this process sets aside. Go ends the whole process when the system refuses it one
// more thread, and the moment at which a limit on processes is reached is the very one at which a command was started.

import (
	"runtime"
	"sync"
)

const (
	parentThreads   = 8   // of a process that only waits for its children
	workerThreads   = 16  // of a worker besides those that wait for commands
	maxThreadsAside = 256 // a worker with more slots makes its other threads as it goes
)

// reserveThreads makes n threads before they are needed. Where there is no room for them the process ends here, while
// it has no task that would count it as its own crash.
func reserveThreads(n int) {
	n = min(n, maxThreadsAside)
	release := make(chan struct{})
	var held, released sync.WaitGroup
	held.Add(n)
	for range n {
		released.Add(1)
		go func() { // ends when all are there
			defer released.Done()
			runtime.LockOSThread()
			defer runtime.UnlockOSThread() // the thread stays, idle
			held.Done()
			<-release
		}()
	}
	held.Wait()
	close(release)
	released.Wait()
}
