#compdef daxhund

autoload -U is-at-least

_daxhund() {
    typeset -A opt_args
    typeset -a _arguments_options
    local ret=1

    if is-at-least 5.2; then
        _arguments_options=(-s -S -C)
    else
        _arguments_options=(-s -C)
    fi

    local context curcontext="$curcontext" state line
    _arguments "${_arguments_options[@]}" : \
'--cpus=[Virtual processors \[default\: boot=1\]]:boot=N,max=N:_default' \
'*--numa=[A guest NUMA node; repeat for more]:KEY=VALUE,..:_default' \
'--platform=[The machine as a whole]:KEY=VALUE,..:_default' \
'--memory=[RAM of the host'\''s own memory \[default\: size=512M\]]:KEY=VALUE,..:_default' \
'*--memory-zone=[A piece of RAM and what backs it; repeat for more]:KEY=VALUE,..:_default' \
'*--pmem=[Persistent memory of the guest; repeat for more]:KEY=VALUE,..:_default' \
'*--device=[A PCI function of the host, passed through; repeat for more]:KEY=VALUE,..:_default' \
'*--disk=[A disk of the guest; repeat for more]:KEY=VALUE,..:_default' \
'*--net=[A network interface of the guest; repeat for more]:KEY=VALUE,..:_default' \
'*--fs=[A directory of the host; repeat for more]:KEY=VALUE,..:_default' \
'*--generic-vhost-user=[A device of whatever type that a vhost-user backend serves; repeat for more]:KEY=VALUE,..:_default' \
'--vsock=[Sockets between guest and host]:KEY=VALUE,..:_default' \
'--balloon=[Memory that the guest lends back to the host]:KEY=VALUE,..:_default' \
'--rng=[Where random numbers come from \[default\: src=/dev/urandom\]]:KEY=VALUE,..:_default' \
'--kernel=[Kernel to boot\: a bzImage, or an ELF kernel with a PVH entry]:PATH:_files' \
'--initramfs=[Initial RAM file system]:PATH:_files' \
'--cmdline=[Kernel command line]:TEXT:_default' \
'--serial=[Serial port\: off, null, tty, pty, file=PATH or socket=PATH \[default\: tty\]]:MODE:_default' \
'--console=[Virtio console\: off, null, tty, pty, file=PATH or socket=PATH \[default\: off\]]:MODE:_default' \
'--api-socket=[Serve the REST API on a unix socket; the guest may come by it]:PATH:_default' \
'--event-monitor=[Write events as JSON to path=PATH or fd=N]:KEY=VALUE:_default' \
'--removal-guard=[Who holds removals of device-dax memory until the guest has let go\: on (a helper), off, daemon \[default\: what there is\]]:MODE:_default' \
'--seccomp=[System call filter; only false is supported yet]:MODE:(true false log)' \
'--log-file=[Write the log to a file instead of standard error]:PATH:_files' \
'*-v[Log more\: -v info, -vv debug, -vvv trace; warnings are always logged]' \
'-V[Print the version]' \
'--version[Print the version]' \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
":: :_daxhund_commands" \
"*::: :->daxhund" \
&& ret=0
    case $state in
    (daxhund)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:daxhund-command-$line[1]:"
        case $line[1] in
            (doctor)
_arguments "${_arguments_options[@]}" : \
'--json[Print JSON instead of a table]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(guard)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
":: :_daxhund__subcmd__guard_commands" \
"*::: :->guard" \
&& ret=0

    case $state in
    (guard)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:daxhund-guard-command-$line[1]:"
        case $line[1] in
            (list)
_arguments "${_arguments_options[@]}" : \
'--socket=[Where the guard listens]:PATH:_files' \
'--json[Print JSON instead of a table]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(release)
_arguments "${_arguments_options[@]}" : \
'--socket=[Where the guard listens]:PATH:_files' \
'-h[Print help]' \
'--help[Print help]' \
':device -- The device, such as dax1.0:_default' \
&& ret=0
;;
(serve)
_arguments "${_arguments_options[@]}" : \
'--fd=[The connection]:0:_default' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
        esac
    ;;
esac
;;
(pool)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
":: :_daxhund__subcmd__pool_commands" \
"*::: :->pool" \
&& ret=0

    case $state in
    (pool)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:daxhund-pool-command-$line[1]:"
        case $line[1] in
            (list)
_arguments "${_arguments_options[@]}" : \
'--json[Print JSON instead of text]' \
'-h[Print help]' \
'--help[Print help]' \
'::pool -- The pool \[default\: every one\]:_default' \
&& ret=0
;;
(free)
_arguments "${_arguments_options[@]}" : \
'--json[Print JSON instead of text]' \
'-h[Print help]' \
'--help[Print help]' \
'::pool -- The pool \[default\: every one\]:_default' \
&& ret=0
;;
(reserve)
_arguments "${_arguments_options[@]}" : \
'--size=[How much]:SIZE:_default' \
'--node=[The host node that it is to be of \[default\: any\]]:N:_default' \
'--json[Print JSON instead of text]' \
'-h[Print help]' \
'--help[Print help]' \
':pool -- The pool:_default' \
&& ret=0
;;
        esac
    ;;
esac
;;
        esac
    ;;
esac
}

(( $+functions[_daxhund_commands] )) ||
_daxhund_commands() {
    local commands; commands=(
'doctor:Check what this host needs to run guests on device-dax memory' \
'guard:What holds the removal of device-dax memory back' \
'pool:The host'\''s pools of device-dax memory' \
    )
    _describe -t commands 'daxhund commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__doctor_commands] )) ||
_daxhund__subcmd__doctor_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund doctor commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__guard_commands] )) ||
_daxhund__subcmd__guard_commands() {
    local commands; commands=(
'list:List what is held, by whom, and who waits' \
'release:Have the users of a device let go of it, then take it from its driver' \
'serve:Serve the VMM that started this' \
    )
    _describe -t commands 'daxhund guard commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__guard__subcmd__list_commands] )) ||
_daxhund__subcmd__guard__subcmd__list_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund guard list commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__guard__subcmd__release_commands] )) ||
_daxhund__subcmd__guard__subcmd__release_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund guard release commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__guard__subcmd__serve_commands] )) ||
_daxhund__subcmd__guard__subcmd__serve_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund guard serve commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__pool_commands] )) ||
_daxhund__subcmd__pool_commands() {
    local commands; commands=(
'list:List pools, their devices, and who has what of them' \
'free:List what is free' \
'reserve:Take a range, print its device, offset and size in bytes, and hold it\: until the pipe or socket that is standard input is closed at its other end, or until a signal' \
    )
    _describe -t commands 'daxhund pool commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__pool__subcmd__free_commands] )) ||
_daxhund__subcmd__pool__subcmd__free_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund pool free commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__pool__subcmd__list_commands] )) ||
_daxhund__subcmd__pool__subcmd__list_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund pool list commands' commands "$@"
}
(( $+functions[_daxhund__subcmd__pool__subcmd__reserve_commands] )) ||
_daxhund__subcmd__pool__subcmd__reserve_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund pool reserve commands' commands "$@"
}

if [ "$funcstack[1]" = "_daxhund" ]; then
    _daxhund "$@"
else
    compdef _daxhund daxhund
fi
