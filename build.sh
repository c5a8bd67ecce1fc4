#!/bin/sh
# Builds ./job_item for this system, or another ($GOOS, $GOARCH, $OUT): one static binary that knows its version.
#   VERSION=v4.1.0 NUMBER=5 ./build.sh
set -eu
cd "$(dirname "$0")"

VERSION=${VERSION:-v4.0.0}
NUMBER=${NUMBER:-4}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
OUT=${OUT:-job_item$(go env GOEXE)}

CGO_ENABLED=0 go build -trimpath -buildvcs=false \
	-ldflags "-s -w -X main.version=$VERSION -X main.versionNumber=$NUMBER -X main.commit=$COMMIT" \
	-o "$OUT" .
echo "built $OUT, $VERSION (number $NUMBER, commit $COMMIT), $(wc -c <"$OUT" | tr -d ' ') bytes"
