package main

// httpapi_hardware.go serves GET /hardware (PROTOCOL section 7).

import (
	"fmt"
	"net/http"
	"time"
)

// serveHardware lets the API answer GET /hardware.
func (a *apiServer) serveHardware(h *hardware) { a.hardware.Store(h) }

// showHardware is GET /hardware: the latest sample, so nothing that hangs can hold it up for long.
func (a *apiServer) showHardware(w http.ResponseWriter, r *http.Request) error {
	h := a.hardware.Load()
	if h == nil {
		return fmt.Errorf("tell the hardware: %w", errStarting)
	}
	select {
	case <-h.looked:
	case <-time.After(hardwareAnswer):
	case <-r.Context().Done():
	}
	return writeJSON(w, http.StatusOK, h.view())
}
