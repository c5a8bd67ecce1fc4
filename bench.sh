#!/bin/sh
# Measures job_item beside a bare loop and beside other programs that run commands (Linux).
#   ./bench.sh              everything: prints the tables, and writes docs/bench.md and bench.svg
#   ./bench.sh quick        the same with few tasks in one round, to try it: writes nothing
#   ./bench.sh scale        how cost grows with jobs, waiting tasks and workers
# ROUNDS, TASKS (in each burst), IDLE_TASKS (one at a time), FLOOD (bytes printed) and WAITING (tasks) change the amounts,
# MATCH, a regular expression, leaves out what does not match. What a peer needs and this machine lacks is installed where
# that is possible (Debian packages, as root; natscli with go install) and left out where it is not.
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
	sed -n '2,5p' "$0" >&2
	exit 2
	;;
esac

# peers puts the programs of others into a folder of their own, which goes with this script.
peers() {
	mkdir "$work/peers"
	say "nats (natscli $NATSCLI)"
	GOBIN=$work/peers go install "github.com/nats-io/natscli/nats@$NATSCLI" || say "could not be had"
	if command -v webhook >/dev/null 2>&1; then
		ln -s "$(command -v webhook)" "$work/peers/webhook"
	fi
	command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ] || return 0
	if [ ! -e "$work/peers/webhook" ] || [ ! -e /usr/lib/python3/dist-packages/celery/__main__.py ]; then
		apt-get update -qq >/dev/null || return 0
	fi
	if [ ! -e "$work/peers/webhook" ]; then
		say "webhook, from its Debian package, without its service"
		(cd "$work" && apt-get download -qq webhook 2>/dev/null &&
			dpkg-deb --fsys-tarfile webhook_*.deb | tar xO ./usr/bin/webhook >peers/webhook && chmod +x peers/webhook) ||
			rm -f "$work/peers/webhook"
	fi
	if [ ! -e /usr/lib/python3/dist-packages/celery/__main__.py ]; then
		say "installing python3-celery and python3-redis"
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-celery python3-redis >/dev/null ||
			say "could not be had"
	fi
}

[ "$entry" != TestBench ] || peers
OUT=$work/job_item ./build.sh >&2
go test -c -o "$work/bench" .
BENCH_BINARY=$work/job_item BENCH_PEERS=$work/peers BENCH_OUT=$out \
	"$work/bench" -test.run "^$entry\$${MATCH:+/$MATCH}" -test.count 1 -test.timeout 0
