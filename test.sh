#!/bin/sh
# The one test command: formatting, vet for the three systems, staticcheck, all tests under the race detector, and each
# fuzz target for a few seconds (FUZZTIME, default 3s; 0s leaves them out). What a test needs and this machine lacks is
# installed where that is possible (Debian packages, as root) and is a failure where it is not.
set -eu
cd "$(dirname "$0")"
PATH=$PATH:/usr/sbin:/sbin:/usr/local/bin # where Debian puts servers, and take what it takes

FUZZTIME=${FUZZTIME:-3s}
STATICCHECK=${STATICCHECK:-v0.7.0}

say() { printf '== %s\n' "$*"; }

# packages: whether Debian packages can be had here, with their list brought up to date once.
packages() {
	command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ] || return 1
	[ -n "${UPDATED:-}" ] || apt-get update -qq >/dev/null
	UPDATED=1
}

# need PROGRAM PACKAGE: the program, from that Debian package if it is missing.
need() {
	command -v "$1" >/dev/null 2>&1 && return 0
	if packages; then
		say "installing $2"
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$2" >/dev/null
		command -v "$1" >/dev/null 2>&1 && return 0
	fi
	echo "$1 is missing: install it (Debian package $2)" >&2
	exit 1
}

# take PROGRAM PACKAGE: only the program, from a Debian package that would bring a server along.
take() {
	command -v "$1" >/dev/null 2>&1 && return 0
	if packages; then
		say "taking $1 from $2"
		package=$(mktemp -d)
		(cd "$package" && apt-get download -qq "$2" 2>/dev/null && dpkg-deb --fsys-tarfile ./*.deb | tar xO "./usr/bin/$1" >"$1" &&
			install "$1" /usr/local/bin/) || true
		rm -rf "$package"
		command -v "$1" >/dev/null 2>&1 && return 0
	fi
	echo "$1 is missing: install it (Debian package $2)" >&2
	exit 1
}

need gcc gcc # the race detector links with it
need python3 python3
need node nodejs
need openssl openssl
need nats-server nats-server
need redis-server redis-server
need rabbitmq-server rabbitmq-server
take promtool prometheus
export JOB_ITEM_TEST_COMPLETE=1 # a test that lacks its program fails instead of being skipped

say "gofmt"
unformatted=$(gofmt -l .)
if [ -n "$unformatted" ]; then
	echo "gofmt would change: $unformatted" >&2
	exit 1
fi

for system in linux windows darwin; do
	say "go vet for $system"
	GOOS=$system CGO_ENABLED=0 go vet ./...
done

say "staticcheck"
go run "honnef.co/go/tools/cmd/staticcheck@$STATICCHECK" ./...

if [ "$FUZZTIME" != 0s ]; then
	output=$(mktemp)
	trap 'rm -f "$output"' EXIT
	for target in $(grep -ho '^func Fuzz[A-Za-z0-9]*' ./*_test.go | cut -d' ' -f2); do
		say "fuzz $target for $FUZZTIME"
		# On a busy machine go's fuzzer may take the end of its own time for a failure: that alone is tried once more.
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$FUZZTIME" . >"$output" 2>&1 || {
			cat "$output"
			grep -q '^    context deadline exceeded$' "$output" && ! grep -q 'Failing input' "$output" || exit 1
			go test -run '^$' -fuzz "^$target\$" -fuzztime "$FUZZTIME" .
		}
		tail -n 1 "$output"
	done
fi

say "go test -race"
go test -race -timeout 20m -parallel 6 ./... # those that run side by side mostly wait
say "all passed"
