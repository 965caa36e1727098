#!/usr/bin/env bash
# Checks what a machine can check, and prints the sizes that a reviewer looks at.
. "$(dirname "$0")/lib.sh"
need_go
status=0
files=$(git ls-files -co --exclude-standard '*.go')
unformatted=$(gofmt -l $files)
if [ -n "$unformatted" ]; then
  echo "gofmt wants:"; echo "$unformatted"; status=1
fi
go vet ./... || status=1
forbidden=$(grep -nE 'exec\.Command(Context)?\((ctx, *)?"(nft|iptables|ip|ipset|conntrack|tc|sysctl)"|time\.Sleep\(|\b(TODO|FIXME)\b' $(grep -vE '_test.go|^scripts/' <<<"$files") || true)
if [ -n "$forbidden" ]; then
  echo "the product runs no helper programs, does not sleep and promises nothing:"; echo "$forbidden"; status=1
fi
if command -v golangci-lint >/dev/null; then
  golangci-lint run || status=1
else
  echo "golangci-lint is not installed: .golangci.yml was not applied"
fi
echo "lines without tests, by package:"
grep -v _test.go <<<"$files" | xargs wc -l | awk '$2 != "total" {d=$2; if (!sub("/[^/]*$", "", d)) d="main"; n[d]+=$1} END {for (d in n) printf "  %6d %s\n", n[d], d}' | sort -k2
echo "functions over 60 lines:"
grep -v _test.go <<<"$files" | xargs awk '
  FNR==1 {start=0} /^func /{start=FNR; name=$0}
  /^}/ && start {n=FNR-start+1; if (n>60) printf "  %4d %s: %s\n", n, FILENAME, substr(name,1,80); start=0}' | sort -rn | head -12
exit $status
