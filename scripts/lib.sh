# Sourced by the scripts here. Finds the repository and the tools that a script needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CGO_ENABLED=0
PATH=$PATH:/usr/local/go/bin:/usr/sbin:/sbin

# need TOOL=PACKAGE...: each tool, and the Debian package that has it. Says what is
# missing and how to get it; gets it with --yes (yes=1) or in CI.
need() {
  local missing=() pair sudo=""
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || sudo="sudo "
  if [ "${yes:-0}" = 1 ] || [ "${CI:-}" = true ]; then
    ${sudo}apt-get update -qq >&2
    ${sudo}env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
    return
  fi
  echo "missing on this machine; run: ${sudo}apt-get install -y ${missing[*]}   (or this script with --yes)" >&2
  exit 2
}

# need_go: Go 1.21 or newer, which fetches the toolchain that go.mod names by itself.
need_go() {
  if ! command -v go >/dev/null; then
    echo "missing on this machine: Go 1.21 or newer (https://go.dev/dl; Debian: golang-go of bookworm-backports)" >&2
    exit 2
  fi
  go version >/dev/null || { echo "this Go cannot fetch the toolchain that go.mod names: see the line above" >&2; exit 2; }
}

# build OUTPUT: the static binary, for the platform that GOARCH names.
build() {
  local version commit
  version=$(git describe --tags --always --dirty 2>/dev/null || echo unknown)
  commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
  go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$version -X main.commit=$commit" -o "$1" .
}
