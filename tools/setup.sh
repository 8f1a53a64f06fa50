#!/bin/sh
# Makes ready what `make demo`, `make check` or `make test` needs: Debian packages and a virtual environment in .venv.
#
#   tools/setup.sh demo     the compiler, and dynacut itself
#   tools/setup.sh check    in addition ruff, mypy, pytest and a C++ compiler
#   tools/setup.sh criu     only a CRIU that works, and what it is built from
#   tools/setup.sh test     all of that, gdb, gdbserver, valgrind and the servers that the integration tests patch
#
# Does nothing, and that quickly, when all is there. As root it installs missing packages, without starting the
# servers among them; as somebody else it says what is missing.
set -eu

wanted=${1:-}
case $wanted in
demo | check | criu | test) ;;
*)
	echo "usage: tools/setup.sh demo|check|criu|test" >&2
	exit 2
	;;
esac
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin
export PATH

say() { echo "setup: $*" >&2; }

# --- Debian packages, each by what it is needed for: whoever has that from elsewhere needs no package. ---

has() { command -v "$1" >/dev/null 2>&1; }

venv_is_sound() {
	[ -x .venv/bin/python ] && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the first Python >= 3.11 that can make a virtual environment.
find_python() {
	for python in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
		if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			echo "$python"
			return
		fi
	done
	return 1
}

needs_criu() { { [ "$wanted" = criu ] || [ "$wanted" = test ]; } && ! tools/criu.sh works; }

missing_packages() {
	if needs_criu; then tools/criu.sh missing; fi
	if [ "$wanted" = test ]; then tools/criu.sh missing crit; fi
	[ "$wanted" != criu ] || return 0
	venv_is_sound || find_python >/dev/null || echo python3 python3-venv
	has "${CC:-gcc}" || has gcc || echo gcc
	[ -e /usr/include/stdio.h ] || echo libc6-dev
	has "${OBJCOPY:-objcopy}" || has objcopy || echo binutils
	[ "$wanted" = demo ] || has g++ || echo g++
	if [ "$wanted" = test ]; then
		has gdb || echo gdb
		has gdbserver || echo gdbserver
		has curl || echo curl
		has valgrind || echo valgrind
		has redis-server || echo redis-server
		has redis-cli || echo redis-tools
		has nginx || echo nginx
		has lighttpd || echo lighttpd
		[ -e /usr/lib/lighttpd/mod_webdav.so ] || echo lighttpd-mod-webdav
	fi
}

# policy-rc.d is how Debian's packages ask whether they may start a service (invoke-rc.d(8)); 101 forbids it.
policy=/usr/sbin/policy-rc.d
policy_aside=

restore_policy() {
	case $policy_aside in
	'') ;;
	none) rm -f "$policy" ;;
	*) mv -f "$policy_aside" "$policy" ;;
	esac
	policy_aside=
}

forbid_services() {
	if [ -x "$policy" ]; then
		status=0
		"$policy" redis-server start >/dev/null 2>&1 </dev/null || status=$?
		[ "$status" -ne 101 ] || return 0
	fi
	trap restore_policy EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	if [ -e "$policy" ] || [ -L "$policy" ]; then
		policy_aside=$policy.before-dynacut
		mv "$policy" "$policy_aside"
	else
		policy_aside=none
	fi
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
}

install_packages() {
	say "installing $*"
	forbid_services
	export DEBIAN_FRONTEND=noninteractive
	if ! {
		apt-get -qq -o DPkg::Lock::Timeout=300 update &&
			apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"
	} </dev/null >build/apt.log 2>&1 9>&-; then
		tail -n 30 build/apt.log >&2
		say "apt-get failed, see above and build/apt.log"
		exit 1
	fi
	restore_policy
	# Nor at the next start of the machine: the tests start servers of their own.
	for package in "$@"; do
		case $package in
		redis-server | nginx | lighttpd)
			if has systemctl; then systemctl --quiet disable "$package.service" >/dev/null 2>&1 9>&- || :; fi
			;;
		esac
	done
}

# Two makes at once would install over each other.
mkdir -p build
if has flock && (: >>build/setup.lock) 2>/dev/null; then
	exec 9>>build/setup.lock
	flock 9
fi

# shellcheck disable=SC2046 # one word for each package
set -- $(missing_packages)
if [ $# -gt 0 ]; then
	if ! has apt-get; then
		say "missing, by the names of Debian's packages: $*"
		say "install them with this system's package manager, then run make again"
		exit 1
	elif [ "$(id -u)" -ne 0 ]; then
		say "missing packages: $*"
		say "install them with: sudo apt-get install $*"
		exit 1
	fi
	install_packages "$@"
	# shellcheck disable=SC2046
	set -- $(missing_packages)
	if [ $# -gt 0 ]; then
		say "still missing after the installation: $*"
		exit 1
	fi
fi

if needs_criu || [ "$wanted" = criu ]; then tools/criu.sh 9>&-; fi
# Without it, the tests that compare with it are skipped.
if [ "$wanted" = test ]; then tools/criu.sh crit 9>&- || :; fi
[ "$wanted" != criu ] || exit 0

# --- The virtual environment. Its stamp says from which files, and where, it was made. ---

case $wanted in
demo) kind=demo install=. ;;
*) kind=dev install='.[dev]' ;;
esac
stamp=.venv/dynacut-$kind
state="$PWD $(cat pyproject.toml setup.py | cksum)"

if venv_is_sound; then
	if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then exit 0; fi
else
	say "making .venv"
	"$(find_python)" -m venv --clear .venv 9>&-
fi
say "installing $install into .venv"
rm -f .venv/dynacut-demo .venv/dynacut-dev
.venv/bin/python -m pip --disable-pip-version-check install -qq --editable "$install" </dev/null >&2 9>&-
echo "$state" >.venv/dynacut-demo
if [ "$kind" = dev ]; then echo "$state" >"$stamp"; fi
