package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// What version 4 says across the lifeline. A parent of that version has to be understood by the worker of the next one,
// and the other way round; a name that changes here breaks updates.
const (
	ordersOfVersion4 = `{"config":{"File":"/etc/job_item/config.yaml","Listen":"127.0.0.1:8080","DrainTimeout":30000000000,"Credential":{"ProjectID":"p","SecretKey":"k"},"Broker":{"Type":"nats","Host":"n"},"Jobs":[{"Event":"e","Cmd":"true","Limit":2}]},"listener":true,"standby":true}
{"config":{"File":"/etc/job_item/config.yaml"},"pending":true,"problems":{"manager":"away"},"execs":[{"key":"side","state":"running","pid":7}]}
{"problems":{}}
{"drain":true}
{"kill":true,"drain":true,"from":"a later version"}
`
	noticesOfVersion4 = `{"alive":true,"pulse":{"status":"ok","running":3,"ended":9}}
{"ready":true}
{"reload":true}
{"shutdown":true,"failed":true}
{"execs":[{"key":"side","state":"failed","pid":0,"restarts":3}],"mood":"good"}
`
)

func TestLifelineOfVersion4(t *testing.T) {
	lines := newLineReader(strings.NewReader(ordersOfVersion4))
	var o order
	next := func(into any) {
		t.Helper()
		must(t, lines.next(into))
	}
	next(&o)
	if c := o.Config; !o.Standby || !o.Listener || o.Pending || c == nil || c.DrainTimeout != 30*time.Second ||
		c.Credential.SecretKey != "k" || c.Broker.Type != "nats" || len(c.Jobs) != 1 || c.Jobs[0].Limit != 2 || o.Problems != nil {
		t.Errorf("first order %+v", o)
	}
	o = order{}
	if next(&o); !o.Pending || o.Standby || o.Problems["manager"] != "away" || len(o.Execs) != 1 || o.Execs[0].PID != 7 {
		t.Errorf("second order %+v", o)
	}
	o = order{}
	if next(&o); o.Problems == nil || o.Config != nil || o.Execs != nil {
		t.Errorf("order without problems %+v", o)
	}
	o = order{}
	if next(&o); !o.Drain || o.Kill {
		t.Errorf("drain order %+v", o)
	}
	if next(&o); !o.Kill {
		t.Errorf("kill order %+v", o)
	}

	lines = newLineReader(strings.NewReader(noticesOfVersion4))
	var n notice
	if next(&n); !n.Alive || n.Pulse == nil || *n.Pulse != (pulse{healthOK, 3, 9}) {
		t.Errorf("alive notice %+v", n)
	}
	for _, want := range []func() bool{
		func() bool { return n.Ready }, func() bool { return n.Reload }, func() bool { return n.Shutdown && n.Failed },
		func() bool { return len(n.Execs) == 1 && n.Execs[0].State == execFailed && n.Execs[0].Restarts == 3 },
	} {
		n = notice{}
		next(&n)
		if !want() {
			t.Errorf("notice %+v", n)
		}
	}

	// What is said today has these names, too.
	for _, row := range []struct {
		message any
		want    string
	}{
		{order{Config: &Config{}, Pending: true, Listener: true, Standby: true, Problems: map[string]string{}, Execs: []execHealth{}},
			"config pending listener standby problems execs"},
		{order{Drain: true, Kill: true}, "drain kill"},
		{notice{Alive: true, Pulse: &pulse{}}, "alive pulse"},
		{notice{Ready: true, Reload: true, Shutdown: true, Failed: true, Execs: []execHealth{}}, "ready reload shutdown failed execs"},
	} {
		var line bytes.Buffer
		must(t, writeLine(&line, row.message))
		var fields map[string]json.RawMessage
		must(t, json.Unmarshal(line.Bytes(), &fields))
		for _, name := range strings.Fields(row.want) {
			if fields[name] == nil {
				t.Errorf("%s is not in %s", name, line.Bytes())
			}
		}
	}
}
