#!/bin/sh
# Measures job_item beside a bare loop and beside other programs that run commands (Linux).
#   ./bench.sh              everything: prints the tables, and writes docs/bench.md and bench.svg
#   ./bench.sh quick        the same with few tasks in one round, to try it: writes nothing
#   ./bench.sh scale        how cost grows with jobs, waiting tasks and workers: prints the tables, and writes them into
#                           docs/scale.md
# ROUNDS, TASKS (in each burst), IDLE_TASKS (one at a time), FLOOD (bytes printed) and WAITING (tasks) change the amounts,
# MATCH, a regular expression, leaves out what does not match (round 1, 8 at once, NATS) and writes nothing. Brokers and
# peers that this machine lacks are installed where that is possible (Debian packages, as root; natscli with go install),
# else left out.
set -eu
cd "$(dirname "$0")"
PATH=$PATH:/usr/sbin:/sbin # where Debian puts servers

NATSCLI=${NATSCLI:-v0.5.1}

say() { printf '== %s\n' "$*" >&2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

entry=TestBench out=$PWD
case ${1:-} in
"") ;;
quick)
	export ROUNDS="${ROUNDS:-1}" TASKS="${TASKS:-200}" IDLE_TASKS="${IDLE_TASKS:-20}" FLOOD="${FLOOD:-50000000}" WAITING="${WAITING:-1000}"
	out=
	;;
scale) entry=TestScale ;;
*)
	sed -n '2,6p' "$0" >&2
	exit 2
	;;
esac
[ -z "${MATCH:-}" ] || out=

# packages: whether Debian packages can be had here, with their list brought up to date once.
packages() {
	command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ] || return 1
	[ -n "${UPDATED:-}" ] || apt-get update -qq >/dev/null || return 1
	UPDATED=1
}

# provide PROGRAM-OR-FILE PACKAGE...: it, from Debian packages if it is missing.
provide() {
	command -v "$1" >/dev/null 2>&1 || [ -e "$1" ] && return 0
	packages || return 0 # it is left out
	shift
	say "installing $*"
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null || say "$* cannot be had"
}

# peers puts the programs of others into a folder that goes with this script.
peers() {
	mkdir "$work/peers"
	say "nats (natscli $NATSCLI)"
	GOBIN=$work/peers go install "github.com/nats-io/natscli/nats@$NATSCLI" || say "natscli cannot be had"
	provide /usr/lib/python3/dist-packages/celery/__main__.py python3-celery python3-redis
	if command -v webhook >/dev/null 2>&1; then
		ln -s "$(command -v webhook)" "$work/peers/webhook"
	elif packages; then
		say "taking webhook from its package, which would bring a service along"
		(cd "$work" && apt-get download -qq webhook 2>/dev/null && dpkg-deb --fsys-tarfile ./webhook_*.deb |
			tar xO ./usr/bin/webhook >webhook && chmod +x webhook && mv webhook peers/) || say "webhook cannot be had"
	fi
}

provide gcc gcc libc6-dev
provide nats-server nats-server
provide redis-server redis-server
provide rabbitmq-server rabbitmq-server
[ "$entry" != TestBench ] || peers
OUT=$work/job_item ./build.sh >&2
go test -c -o "$work/bench" .
BENCH_BINARY=$work/job_item BENCH_PEERS=$work/peers BENCH_OUT=$out \
	"$work/bench" -test.run "^$entry\$${MATCH:+/$MATCH}" -test.count 1 -test.timeout 0
