//go:build unix

package main

// system_scripts_test.go runs job scripts as the languages of a system have them.

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestScriptsOfTheSystem runs job scripts in three languages that use the environment as such scripts always have.
func TestScriptsOfTheSystem(t *testing.T) {
	for _, script := range []struct{ program, name, text string }{
		{"sh", "job.sh", scriptSh}, {"python3", "job.py", scriptPython}, {"node", "job.js", scriptNode},
	} {
		t.Run(script.program, func(t *testing.T) {
			needProgram(t, script.program)
			a := newAgent(t, `
credential: {project_id: p1, secret_key: top-secret}
jobs:
  - {event: script, cmd: '`+script.program+` `+script.name+` %SELF%'}
`)
			a.write(script.name, script.text)
			a.env = []string{"JOB_ITEM_TEST_MAIN=1"}
			a.start()
			id := a.create("script", `{"answer":42}`)
			v := a.wait(id, statusFinish)
			if len(v.Notifications) != 1 || v.Notifications[0].Msg != "working on 42" {
				t.Errorf("notifications = %+v", v.Notifications)
			}
			var result struct{ Doubled int }
			if err := json.Unmarshal(v.Result, &result); err != nil || result.Doubled != 84 {
				t.Errorf("result = %s, %v", v.Result, err)
			}
			if len(v.Files) != 1 || v.Files[0].Name != "report.txt" || v.Files[0].Size != 6 {
				t.Errorf("files = %+v", v.Files)
			}
			if got := a.output(id); !strings.Contains(got, "read 42\n") {
				t.Errorf("log = %q", got)
			}
			resp, err := http.Get(a.url + "/job/" + id + "/files/report.txt")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if content, _ := io.ReadAll(resp.Body); string(content) != "answer" {
				t.Errorf("file = %q", content)
			}
			if strings.Contains(a.log.String(), "top-secret") {
				t.Error("the log shows the secret key")
			}
		})
	}
}

func needProgram(t testing.TB, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err == nil {
		return
	}
	if os.Getenv("JOB_ITEM_TEST_COMPLETE") != "" {
		t.Fatalf("%s is missing; install it (test.sh does)", program)
	}
	t.Skipf("%s is missing; ./test.sh installs it", program)
}

const scriptSh = `set -e
answer=$(sed 's/.*"answer":\([0-9]*\).*/\1/' "$JOB_ITEM_TASK_ID.json")
echo "read $answer"
printf 'working on %s' "$answer" | "$1" save >/dev/null
printf answer > report.txt
"$1" upload report.txt
"$1" result "{\"doubled\":$((answer * 2))}"
`

const scriptPython = `import json, os, urllib.request
env = os.environ
task = json.load(open(env["JOB_ITEM_TASK_ID"] + ".json"))
print("read", task["answer"])
def post(url, body, **headers):
    urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers)).read()
auth = "Bearer " + env["JOB_ITEM_PROJECT_KEY"]
post(env["JOB_ITEM_MSG_NOTIF_HOST"], json.dumps({"msg": "working on %d" % task["answer"]}).encode(),
     **{"Content-Type": "application/json"})
body = (b'--b\r\nContent-Disposition: form-data; name="file"; filename="report.txt"\r\n'
        b'Content-Type: text/plain\r\n\r\nanswer\r\n--b--\r\n')
post(env["JOB_MANAGER_UPLOAD_FILE"], body, **{"Content-Type": "multipart/form-data; boundary=b", "Authorization": auth})
post(env["JOB_MANAGER_RESULT_URL"], json.dumps({"doubled": 2 * task["answer"]}).encode(),
     **{"Content-Type": "application/json", "Authorization": auth})
`

const scriptNode = `const fs = require('fs')
const env = process.env
const task = JSON.parse(fs.readFileSync(env.JOB_ITEM_TASK_ID + '.json', 'utf8'))
console.log('read', task.answer)
const auth = { Authorization: 'Bearer ' + env.JOB_ITEM_PROJECT_KEY }
const post = async (url, body, headers) => {
  const answer = await fetch(url, { method: 'POST', body, headers })
  if (!answer.ok) throw new Error(url + ': ' + answer.status + ' ' + await answer.text())
}
const main = async () => {
  await post(env.JOB_ITEM_MSG_NOTIF_HOST, JSON.stringify({ msg: 'working on ' + task.answer }),
    { 'Content-Type': 'application/json' })
  const form = new FormData()
  form.append('file', new Blob(['answer']), 'report.txt')
  await post(env.JOB_MANAGER_UPLOAD_FILE, form, auth)
  await post(env.JOB_MANAGER_RESULT_URL, JSON.stringify({ doubled: 2 * task.answer }),
    { 'Content-Type': 'application/json', ...auth })
}
main().catch(err => { console.error(err); process.exit(1) })
`
