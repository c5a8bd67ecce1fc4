package main

// httpapi_metrics.go serves GET /metrics (PROTOCOL section 7), and adds what the API knows of itself.

import (
	"net/http"
	"strconv"
)

// serveMetrics adds the call. It must come before serve.
func (a *apiServer) serveMetrics(m *metrics) {
	a.handle(metricsPattern, func(w http.ResponseWriter, _ *http.Request) error {
		var text metricsText
		m.write(&text)
		a.writeMetrics(&text)
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, err := w.Write(text.buf.Bytes())
		return err
	})
}

// metricsPattern is answered from the first moment, as the health is.
const metricsPattern = "GET /metrics"

func (a *apiServer) writeMetrics(x *metricsText) {
	x.family(kindCounter, "job_item_http_requests_total", "Requests to the REST API that were answered, by class of status.")
	for class := 2; class < len(a.answered); class++ {
		x.value(float64(a.answered[class].Load()), "code", strconv.Itoa(class)+"xx")
	}
	readers, followers, dropped := a.feed.count()
	x.single(kindGauge, "job_item_event_readers", "Readers of GET /events.", float64(readers))
	x.single(kindCounter, "job_item_event_readers_dropped_total",
		"Readers of GET /events that could not keep up and were dropped.", float64(dropped))
	x.single(kindGauge, "job_item_log_followers", "Readers that follow the log of a task.", float64(followers))
}

// countAnswer counts an answered request; status is 0 when the handler has written nothing at all.
func (a *apiServer) countAnswer(status int) {
	class := status / 100
	if class < 2 || class >= len(a.answered) {
		class = 2
	}
	a.answered[class].Add(1)
}
