# Completion of the dynacut command for bash:
#
#   . tools/completion.bash      in this shell; where the package bash-completion is, `make install` is enough
#
# Commands and options are those that --help names, asked once in each shell.

declare -gA _dynacut_words=()

# Prints what --help of dynacut, or of one of its commands, lists in its left column.
_dynacut_listed() {
	"$1" ${2:+"$2"} --help 2>/dev/null |
		sed -nE 's/^  (-[a-zA-Z][^-]*, )?(--[a-z-]+).*/\2/p; s/^  (-[a-zA-Z]) .*/\1/p; s/^    ([a-z]+)( .*|$)/\1/p'
}

_dynacut() {
	local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command='' index
	for ((index = 1; index < COMP_CWORD; index++)); do
		[[ ${COMP_WORDS[index]} == -- ]] && return # the command line of another program
	done
	((COMP_CWORD > 1)) && command=${COMP_WORDS[1]}
	case $before in
	--pid) COMPREPLY=($(compgen -W "$(cd /proc && echo [0-9]*)" -- "$word")) && return ;;
	--name) [[ $command == live ]] && COMPREPLY=($(compgen -W "$(cat /proc/[0-9]*/comm 2>/dev/null)" -- "$word")) && return ;;
	--scope) COMPREPLY=($(compgen -W 'entry block page' -- "$word")) && return ;;
	--engine) COMPREPLY=($(compgen -W 'ptrace gdb' -- "$word")) && return ;;
	--fallback) COMPREPLY=($(compgen -W checkpoint -- "$word")) && return ;;
	esac
	if [[ -n $command && $word != -* ]]; then
		COMPREPLY=() # files, by -o default
		return
	fi
	[[ -n ${_dynacut_words[.$command]-} ]] || _dynacut_words[.$command]=$(_dynacut_listed "${COMP_WORDS[0]}" "$command")
	COMPREPLY=($(compgen -W "${_dynacut_words[.$command]}" -- "$word"))
}

complete -o default -F _dynacut dynacut
