#!/bin/sh
# Builds what a version is published as, into dist/: a binary for each system, their bill of materials (CycloneDX), the
# licences of what is linked in, SHA256SUMS and, with KEY, versions.json: what the manager answers for each system.
#   VERSION=v4.1.0 NUMBER=5 KEY=release.key LINK=https://example.org/job_item/ ./release.sh
#   VERSION=v4.1.0 NUMBER=5 ./release.sh --check     builds it again elsewhere and compares that with dist/
# The same source, Go, VERSION, NUMBER and COMMIT give the same bytes. Besides Go it needs what any Unix has.
set -eu
cd "$(dirname "$0")"

SYSTEMS='linux-amd64 linux-arm64 linux-armv7 linux-386 darwin-amd64 darwin-arm64 windows-amd64 windows-arm64 freebsd-amd64'

# What the environment, or `go env -w`, could say about code generation would be in the bytes.
export GOFLAGS=-mod=readonly GOWORK=off GOAMD64=v1 GO386=sse2 GOARM=7 GOARM64=v8.0 GOFIPS140=off
unset GOOS GOARCH
export LC_ALL=C # the licences are bytes to tr and awk, and sort goes by them

stop() {
	echo "release.sh: $*" >&2
	exit 1
}

export VERSION="${VERSION:-v4.0.0}" NUMBER="${NUMBER:-4}"
case $VERSION in *[!A-Za-z0-9._+-]*) stop "VERSION is part of file names, \"$VERSION\" cannot be" ;; esac
case $NUMBER in 0* | *[!0-9]*) stop "NUMBER is what workers compare, want 1 or more, got \"$NUMBER\"" ;; esac
if [ -z "${COMMIT:-}" ]; then
	# Twelve digits: how many --short takes of itself depends on what else the clone holds.
	COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null) || stop "this is no git clone: set COMMIT"
	[ -z "$(git status --porcelain)" ] || stop "$COMMIT does not lead to this source: commit the changes, or set COMMIT"
fi
export COMMIT

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
trap 'exit 1' HUP INT TERM

sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

# file SYSTEM: what its binary is called.
file() {
	case $1 in
	windows-*) echo "job_item-$VERSION-$1.exe" ;;
	*) echo "job_item-$VERSION-$1" ;;
	esac
}

# arch SYSTEM: its architecture as Go, and a worker that asks the manager, call it.
arch() {
	case $1 in
	*-armv7) echo arm ;;
	*) echo "${1#*-}" ;;
	esac
}

# licence FOLDER: the SPDX expression for all the licences that the module's own licence file holds. One that is not
# recognised ends the release: a person has to read it first.
licence() {
	cat "$1"/LICENSE* | tr -s '[:space:]' ' ' | awk '
	{ text = text $0 }
	END {
		if (text ~ /Apache License,? ?Version 2\.0/) all = all " AND Apache-2.0"
		if (text ~ /Redistribution and use in source and binary forms/)
			all = all (text ~ /Neither the name/ ? " AND BSD-3-Clause" : " AND BSD-2-Clause")
		if (text ~ /Permission is hereby granted, free of charge/) all = all " AND MIT"
		if (text ~ /Mozilla Public License,? [Vv]ersion 2\.0/) all = all " AND MPL-2.0"
		print substr(all, 6)
		exit (all == "")
	}' || stop "the licence in $1 is not recognised: read it, and teach licence() to"
}

# linked: one line for each module that is in any of the binaries, which say it themselves: path, version, go.sum's
# checksum (- for Go's own library) and the systems it is linked into.
linked() {
	for system in $SYSTEMS; do
		go version -m "$(file "$system")" | awk -v on="$system" '
			NR == 1 { print "std", substr($2, 3), "-", on }
			$1 == "dep" { print $2, $3, $4, on }'
	done | sort -k1,3 -s | awk '
		($1 " " $2 " " $3) != module { if (module) print module systems; module = $1 " " $2 " " $3; systems = "" }
		{ systems = systems " " $4 }
		END { print module systems }'
}

# materials: the bill of materials, and LICENSES.txt on the way. It has no times and no random serial number, so that it
# is reproducible as the binaries are. awk writes it rather than a Go program, and the folder stays one package.
materials() {
	cp ../LICENSE LICENSES.txt
	linked >"$temp/linked"
	while read -r path version sum systems; do
		if [ "$path" = std ]; then
			folder=$(go env GOROOT) # some systems' packages of Go leave the licence out there
			expression=BSD-3-Clause
		else
			folder=$(cd .. && go list -m -f '{{.Dir}}' "$path")
			expression=$(licence "$folder")
		fi
		for text in "$folder"/LICENSE* "$folder"/NOTICE*; do
			[ ! -f "$text" ] || { printf '\n==== %s %s: %s ====\n\n' "$path" "$version" "${text##*/}" && cat "$text"; } >>LICENSES.txt
		done
		printf '%s|%s|%s|%s|%s\n' "$path" "$version" "$sum" "$expression" "$systems"
	done <"$temp/linked" >"$temp/components"
	awk -F '|' -v version="$VERSION" -v everywhere="$SYSTEMS" '
	# hex turns the base64 of go.sum into what CycloneDX wants.
	function hex(text,   i, bits, value, out) {
		for (i = 1; i <= length(text) && substr(text, i, 1) != "="; i++) {
			value = value * 64 + index("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", substr(text, i, 1)) - 1
			for (bits += 6; bits >= 4; value %= 2 ^ bits) {
				bits -= 4
				out = out substr("0123456789abcdef", int(value / 2 ^ bits) + 1, 1)
			}
		}
		return out
	}
	function component(type, name, version, purl, expression) {
		return sprintf("\"type\": \"%s\", \"bom-ref\": \"%s\", \"name\": \"%s\", \"version\": \"%s\", \"purl\": \"%s\", \"licenses\": [%s]",
			type, purl, name, version, purl,
			expression ~ / / ? "{\"expression\": \"" expression "\"}" : "{\"license\": {\"id\": \"" expression "\"}}")
	}
	function packageURL(kind, name, version) {
		gsub(/\+/, "%2B", version) # as in v2.0.0+incompatible
		return "pkg:" kind "/" name "@" version
	}
	BEGIN {
		self = packageURL("generic", "job_item", version)
		print "{\n  \"bomFormat\": \"CycloneDX\",\n  \"specVersion\": \"1.5\",\n  \"version\": 1,"
		print "  \"metadata\": {\"component\": {" component("application", "job_item", version, self, "MIT") "}},"
		print "  \"components\": ["
	}
	{
		purl = packageURL("golang", $1, $2)
		printf "%s    {%s", (NR > 1 ? ",\n" : ""), component("library", $1, $2, purl, $4)
		if ($3 != "-") printf ", \"hashes\": [{\"alg\": \"SHA-256\", \"content\": \"%s\"}]", hex(substr($3, 4))
		if ($5 != everywhere) printf ", \"properties\": [{\"name\": \"job_item:only_in\", \"value\": \"%s\"}]", $5
		printf "}"
		uses = uses (NR > 1 ? ", " : "") "\"" purl "\""
	}
	END { print "\n  ],\n  \"dependencies\": [{\"ref\": \"" self "\", \"dependsOn\": [" uses "]}]\n}" }
	' "$temp/components" >"job_item-$VERSION.cdx.json"
}

# versions: what the manager answers, for each system by the os and arch that a worker asks with.
versions() {
	key=$1
	comma=''
	echo '['
	for system in $SYSTEMS; do
		name=$(file "$system")
		signed=$("$temp/job_item" sign --key "$key" --json "$name")
		printf '%s{"os":"%s","arch":"%s","job_item_version_number":%s,"job_item_version":"%s",%s%s' "$comma" "${system%%-*}" \
			"$(arch "$system")" "$NUMBER" "$VERSION" "${LINK:+\"job_item_link\":\"${LINK%/}/$name\",}" "${signed#?}"
		comma=',
'
	done
	printf '\n]\n'
}

build() {
	rm -rf dist
	mkdir dist
	for system in $SYSTEMS; do
		GOOS=${system%%-*} GOARCH=$(arch "$system") OUT=dist/$(file "$system") ./build.sh
	done
	JOB_ITEM_DIST=dist go test -count=1 -run '^TestDist$' .
	[ -z "${KEY:-}" ] || OUT=$temp/job_item ./build.sh # this system's, to sign with
	case ${KEY:-} in
	'' | /*) key=${KEY:-} ;;
	*) key=$PWD/$KEY ;;
	esac
	cd dist
	materials
	sha256 job_item-* LICENSES.txt >SHA256SUMS
	[ -z "$key" ] || versions "$key" >versions.json
}

# check builds in a folder with another name and an empty build cache: nothing can come from the first build.
check() {
	[ -f dist/SHA256SUMS ] || stop "there is nothing to compare with: ./release.sh first"
	(cd dist && sha256 -c SHA256SUMS >/dev/null) || stop "dist/ is not what its SHA256SUMS says"
	mkdir "$temp/another folder"
	cp ./*.go ./*.s ./*.html go.mod go.sum build.sh release.sh LICENSE "$temp/another folder/"
	(cd "$temp/another folder" && GOCACHE=$temp/cache KEY='' ./release.sh)
	diff dist/SHA256SUMS "$temp/another folder/dist/SHA256SUMS" || stop "dist/ is not what this source gives"
	echo "dist/ can be reproduced: the same bytes from another folder, with an empty build cache"
}

case $* in
'') build ;;
--check) check ;;
*)
	echo "usage: [VERSION=…] [NUMBER=…] [COMMIT=…] [KEY=FILE] [LINK=URL] ./release.sh [--check]" >&2
	exit 2
	;;
esac
