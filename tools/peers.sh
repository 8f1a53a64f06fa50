#!/bin/sh
# Gets what `make bench` measures dynacut beside and dynacut itself has no use for, into build/peers: Frida and
# pyinjector, by pip. What cannot be got is said; the benchmarks then report it as NOT MEASURED.
set -eu

cd "$(dirname "$0")/.."
folder=build/peers
mkdir -p "$folder"
for package in frida pyinjector; do
	[ ! -d "$folder/$package" ] || continue
	echo "peers: installing $package into $folder" >&2
	if ! .venv/bin/python -m pip --disable-pip-version-check install -qq --target "$folder" --upgrade "$package" \
		</dev/null >build/peers.log 2>&1; then
		tail -n 3 build/peers.log >&2
		echo "peers: $package cannot be installed, see build/peers.log; it will not be measured" >&2
	fi
done
