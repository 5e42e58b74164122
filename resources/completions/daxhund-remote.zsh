#compdef daxhund-remote

autoload -U is-at-least

_daxhund-remote() {
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
'--api-socket=[The socket it listens on]:PATH:_files' \
'-V[Print the version]' \
'--version[Print the version]' \
'-h[Print help]' \
'--help[Print help]' \
":: :_daxhund-remote_commands" \
"*::: :->daxhund-remote" \
&& ret=0
    case $state in
    (daxhund-remote)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:daxhund-remote-command-$line[1]:"
        case $line[1] in
            (add-device)
_arguments "${_arguments_options[@]}" : \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':word -- Its keys and values:_default' \
&& ret=0
;;
(add-disk)
_arguments "${_arguments_options[@]}" : \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':word -- Its keys and values:_default' \
&& ret=0
;;
(add-fs)
_arguments "${_arguments_options[@]}" : \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':word -- Its keys and values:_default' \
&& ret=0
;;
(add-generic-vhost-user)
_arguments "${_arguments_options[@]}" : \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':word -- Its keys and values:_default' \
&& ret=0
;;
(add-net)
_arguments "${_arguments_options[@]}" : \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':word -- Its keys and values:_default' \
&& ret=0
;;
(add-pmem)
_arguments "${_arguments_options[@]}" : \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':word -- Its keys and values:_default' \
&& ret=0
;;
(add-vsock)
_arguments "${_arguments_options[@]}" : \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':word -- Its keys and values:_default' \
&& ret=0
;;
(boot)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(counters)
_arguments "${_arguments_options[@]}" : \
'--json[Print JSON, one object on one line]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(create)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
'::path -- The configuration as JSON; - is standard input:_files' \
&& ret=0
;;
(delete)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(drain)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
':id -- The device'\''s or the zone'\''s name:_default' \
&& ret=0
;;
(info)
_arguments "${_arguments_options[@]}" : \
'--json[Print JSON, one object on one line]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(metrics)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(nmi)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(pause)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(ping)
_arguments "${_arguments_options[@]}" : \
'--json[Print JSON, one object on one line]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(power-button)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(reboot)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(regions)
_arguments "${_arguments_options[@]}" : \
'--json[Print JSON, one object on one line]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(remove-device)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
':id -- The device'\''s name:_default' \
&& ret=0
;;
(resize)
_arguments "${_arguments_options[@]}" : \
'--balloon=[How much the balloon takes]:SIZE:_default' \
'--cpus=[How many vCPUs]:N:_default' \
'--memory=[How much RAM]:SIZE:_default' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(resize-disk)
_arguments "${_arguments_options[@]}" : \
'--disk=[The disk'\''s name]:ID:_default' \
'--size=[How much the guest is to have]:SIZE:_default' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(resume)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(shutdown)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(shutdown-vmm)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
(watch)
_arguments "${_arguments_options[@]}" : \
'--interval=[From one time to the next]:SECONDS:_default' \
'--count=[End when it was shown so often]:N:_default' \
'--json[Print JSON, one object on one line]' \
'-h[Print help]' \
'--help[Print help]' \
&& ret=0
;;
        esac
    ;;
esac
}

(( $+functions[_daxhund-remote_commands] )) ||
_daxhund-remote_commands() {
    local commands; commands=(
'add-device:Add a PCI function of the host' \
'add-disk:Add a disk' \
'add-fs:Add a directory of the host' \
'add-generic-vhost-user:Add a device of whatever type that a vhost-user backend serves' \
'add-net:Add a network device' \
'add-pmem:Add persistent memory' \
'add-vsock:Add a vsock device' \
'boot:Start the guest that was created' \
'counters:Print what the guest'\''s devices have counted' \
'create:Define a guest' \
'delete:Forget the guest' \
'drain:Take a device or a memory zone from the guest, and wait until the host may have it' \
'info:Print the guest'\''s configuration and state' \
'metrics:Print numbers for a monitoring system' \
'nmi:Send the guest a non-maskable interrupt, as for a dump of its memory' \
'pause:Hold the guest' \
'ping:Print who answers' \
'power-button:Press the guest'\''s power button' \
'reboot:Take the guest down and start it again' \
'regions:Print where the guest'\''s memory is, and who has it' \
'remove-device:Ask the guest to give up a device' \
'resize:Change how much the guest has' \
'resize-disk:Make a disk of the guest larger' \
'resume:Let the guest go on' \
'shutdown:Take the guest down' \
'shutdown-vmm:End the daxhund' \
'watch:Show what the guest does, again and again, until it goes' \
    )
    _describe -t commands 'daxhund-remote commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__add-device_commands] )) ||
_daxhund-remote__subcmd__add-device_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote add-device commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__add-disk_commands] )) ||
_daxhund-remote__subcmd__add-disk_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote add-disk commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__add-fs_commands] )) ||
_daxhund-remote__subcmd__add-fs_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote add-fs commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__add-generic-vhost-user_commands] )) ||
_daxhund-remote__subcmd__add-generic-vhost-user_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote add-generic-vhost-user commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__add-net_commands] )) ||
_daxhund-remote__subcmd__add-net_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote add-net commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__add-pmem_commands] )) ||
_daxhund-remote__subcmd__add-pmem_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote add-pmem commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__add-vsock_commands] )) ||
_daxhund-remote__subcmd__add-vsock_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote add-vsock commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__boot_commands] )) ||
_daxhund-remote__subcmd__boot_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote boot commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__counters_commands] )) ||
_daxhund-remote__subcmd__counters_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote counters commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__create_commands] )) ||
_daxhund-remote__subcmd__create_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote create commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__delete_commands] )) ||
_daxhund-remote__subcmd__delete_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote delete commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__drain_commands] )) ||
_daxhund-remote__subcmd__drain_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote drain commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__info_commands] )) ||
_daxhund-remote__subcmd__info_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote info commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__metrics_commands] )) ||
_daxhund-remote__subcmd__metrics_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote metrics commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__nmi_commands] )) ||
_daxhund-remote__subcmd__nmi_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote nmi commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__pause_commands] )) ||
_daxhund-remote__subcmd__pause_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote pause commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__ping_commands] )) ||
_daxhund-remote__subcmd__ping_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote ping commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__power-button_commands] )) ||
_daxhund-remote__subcmd__power-button_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote power-button commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__reboot_commands] )) ||
_daxhund-remote__subcmd__reboot_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote reboot commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__regions_commands] )) ||
_daxhund-remote__subcmd__regions_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote regions commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__remove-device_commands] )) ||
_daxhund-remote__subcmd__remove-device_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote remove-device commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__resize_commands] )) ||
_daxhund-remote__subcmd__resize_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote resize commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__resize-disk_commands] )) ||
_daxhund-remote__subcmd__resize-disk_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote resize-disk commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__resume_commands] )) ||
_daxhund-remote__subcmd__resume_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote resume commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__shutdown_commands] )) ||
_daxhund-remote__subcmd__shutdown_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote shutdown commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__shutdown-vmm_commands] )) ||
_daxhund-remote__subcmd__shutdown-vmm_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote shutdown-vmm commands' commands "$@"
}
(( $+functions[_daxhund-remote__subcmd__watch_commands] )) ||
_daxhund-remote__subcmd__watch_commands() {
    local commands; commands=()
    _describe -t commands 'daxhund-remote watch commands' commands "$@"
}

if [ "$funcstack[1]" = "_daxhund-remote" ]; then
    _daxhund-remote "$@"
else
    compdef _daxhund-remote daxhund-remote
fi
