#!/usr/bin/env bash
# Runs a go command in this module against Debian's packages instead of downloaded modules:
#
#     ./offline.sh test -race millrace.io/millrace
#
# Debian keeps Go libraries as a GOPATH; this one adds the module itself, and a cache of its own.
# GOCODE names another folder of such libraries.
set -euo pipefail
cd "$(dirname "$0")"
build=$PWD/build
link=$build/src/millrace.io/millrace
mkdir -p "$(dirname "$link")"
[ "$(readlink "$link")" = "$PWD" ] || ln -sfn "$PWD" "$link"
export GO111MODULE=off GOFLAGS= GOPATH=$build:${GOCODE:-/usr/share/gocode} GOCACHE=$build/cache
exec go "$@"
