#!/bin/sh
# Gets a CRIU that works on this kernel: the installed one if it does, else one built from Debian's newer source package.
#
#   tools/criu.sh            builds build/criu/criu where no CRIU works yet; needs root and what `missing` prints
#   tools/criu.sh works      exits with 0 if a CRIU works already
#   tools/criu.sh missing    prints the Debian packages that the build lacks
#   tools/criu.sh crit       puts crit, CRIU's tool that turns images into JSON, into build/criu/crit: tests and benchmarks
#                            compare with it; needs what `missing crit` prints
#
# `make criu` and `make test` call it through tools/setup.sh, which installs those packages.
set -eu

cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH
folder=build/criu
# Older ones may not know the kernel: Debian 12's own 3.17 does not work from Linux 6.13 on.
suites='forky sid trixie'

say() { echo "criu: $*" >&2; }
has() { command -v "$1" >/dev/null 2>&1; }

# Never by the version: only the kernel knows whether it works.
is_good() { has "$1" && "$1" check >/dev/null 2>&1 </dev/null; }

find_good() {
	for criu in "${DYNACUT_CRIU:-}" criu "$folder/criu"; do
		if [ -n "$criu" ] && is_good "$criu"; then
			echo "$criu"
			return
		fi
	done
	return 1
}

has_header() { [ -e "/usr/include/$1" ] || [ -e "/usr/include/$(uname -m)-linux-gnu/$1" ]; }

missing_for_crit() {
	has protoc || echo protobuf-compiler
	has xz || echo xz-utils
	has_header google/protobuf/descriptor.proto || echo libprotobuf-dev
}

missing() {
	missing_for_crit
	has "${CC:-gcc}" || has gcc || echo gcc
	has make || echo make
	has pkg-config || echo pkgconf
	has protoc-c || echo protobuf-c-compiler
	has_header bsd/string.h || echo libbsd-dev
	has_header sys/capability.h || echo libcap-dev
	has_header gnutls/gnutls.h || echo libgnutls28-dev
	has_header libnet.h || echo libnet1-dev
	has_header nftables/libnftables.h || echo libnftables-dev
	has_header libnl3/netlink/netlink.h || echo libnl-3-dev
	has_header protobuf-c/protobuf-c.h || echo libprotobuf-c-dev
	has_header uuid/uuid.h || echo uuid-dev
}

# The mirror that apt uses for Debian itself, not for its security updates.
find_mirror() {
	apt-get indextargets 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' --format '$(REPO_URI)' | head -n 1
}

# Downloads the source of a suite into $folder; the machine's own sources and lists stay as they are. apt checks
# signature and checksums as ever.
download() {
	keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	rm -rf "$folder/apt" "$folder"/criu_*
	mkdir -p "$folder/apt/sources" "$folder/apt/lists/partial"
	{
		echo 'Types: deb-src'
		echo "URIs: $mirror"
		echo "Suites: $1"
		echo 'Components: main'
		[ ! -e "$keyring" ] || echo "Signed-By: $keyring"
	} >"$folder/apt/sources/debian.sources"
	set -- -qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$PWD/$folder/apt/sources" \
		-o "Dir::State::Lists=$PWD/$folder/apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
	apt-get "$@" update </dev/null &&
		(cd "$folder" && apt-get "$@" source --download-only --tar-only criu </dev/null)
}

unpack() {
	rm -rf "$folder/source"
	mkdir "$folder/source"
	tar -xf "$folder"/criu_*.orig.tar.* --strip-components=1 -C "$folder/source"
}

tidy() { rm -rf "$folder/source" "$folder/apt" "$folder"/criu_*; }

has_crit() { [ -e "$folder/crit/crit/__main__.py" ]; }

# What CRIU's own makefiles do for crit and the module pycriu that it uses, without a need for CRIU's libraries.
keep_crit() {
	source=$folder/source
	new=$folder/crit.new
	images=$new/pycriu/images
	rm -rf "$new" "$folder/crit"
	mkdir "$new" &&
		cp -R "$source/lib/pycriu" "$source/crit/crit" "$new" &&
		protoc -I "$source/images" -I /usr/include --python_out="$images" "$source"/images/*.proto &&
		mv "$images/rpc_pb2.py" "$new/pycriu" &&
		python3 "$source/scripts/magic-gen.py" "$source/criu/include/magic.h" "$images/magic.py" &&
		for module in "$images"/*_pb2.py; do
			module=$(basename "$module" .py)
			[ "$module" = opts_pb2 ] || echo "from .$module import *"
		done >"$images/pb.py" &&
		echo "__version__ = 'source'" >"$new/pycriu/version.py" &&
		cp "$new/pycriu/version.py" "$new/crit" &&
		mv "$new" "$folder/crit"
}

build() {
	# The flags of the make that called this are not for CRIU's.
	unset MAKEFLAGS MFLAGS MAKELEVEL
	make -C "$folder/source" -j"$(nproc)" WERROR=0 criu </dev/null
}

wanted=criu
case "$*" in
'') ;;
works)
	find_good >/dev/null
	exit
	;;
missing)
	missing
	exit
	;;
crit)
	wanted=crit
	if has_crit; then exit 0; fi
	;;
'missing crit')
	if ! has_crit; then missing_for_crit; fi
	exit
	;;
*)
	echo "usage: tools/criu.sh [works | missing [crit] | crit]" >&2
	exit 2
	;;
esac

if [ "$(id -u)" -ne 0 ]; then
	say "whether CRIU works can only be seen as root: run this by sudo"
	exit 1
fi
if [ "$wanted" = criu ] && good=$(find_good); then
	say "$(command -v "$good") works on this kernel"
	exit 0
fi
if ! has apt-get || ! mirror=$(find_mirror) || [ -z "$mirror" ]; then
	say "there is no Debian mirror in apt's configuration to get a $wanted from that works on this kernel"
	say "build CRIU 4.1 or newer, and put it into PATH or name it by DYNACUT_CRIU"
	exit 1
fi
mkdir -p "$folder"
for suite in $suites; do
	say "building $wanted from Debian $suite"
	if ! { download "$suite" && unpack; } >"$folder/log" 2>&1; then
		say "its source cannot be had from Debian $suite: $(tail -n 1 "$folder/log")"
		continue
	fi
	if ! has_crit && ! keep_crit >>"$folder/log" 2>&1; then
		say "crit cannot be built: $(tail -n 1 "$folder/log")"
	fi
	if [ "$wanted" = crit ]; then
		tidy
		if has_crit; then exit 0; fi
		continue
	fi
	if ! build >>"$folder/log" 2>&1; then
		tail -n 20 "$folder/log" >&2
		say "it cannot be built, see above and $folder/log"
		continue
	fi
	if ! is_good "$folder/source/criu/criu"; then
		"$folder/source/criu/criu" check >&2 </dev/null || :
		say "CRIU from Debian $suite does not work on this kernel either"
		continue
	fi
	mv -f "$folder/source/criu/criu" "$folder/criu"
	tidy
	say "$folder/criu works on this kernel"
	exit 0
done
[ "$wanted" = criu ] || exit 1
say "no CRIU could be made to work: checkpoint, restore and trim will refuse"
exit 1
