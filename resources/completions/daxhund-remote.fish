# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_daxhund_remote_global_optspecs
    string join \n api-socket= V/version h/help
end

function __fish_daxhund_remote_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_daxhund_remote_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_daxhund_remote_using_subcommand
    set -l cmd (__fish_daxhund_remote_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -l api-socket -d 'The socket it listens on' -r -F
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -s V -l version -d 'Print the version'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "add-device" -d 'Add a PCI function of the host'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "add-disk" -d 'Add a disk'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "add-fs" -d 'Add a directory of the host'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "add-generic-vhost-user" -d 'Add a device of whatever type that a vhost-user backend serves'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "add-net" -d 'Add a network device'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "add-pmem" -d 'Add persistent memory'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "add-vsock" -d 'Add a vsock device'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "boot" -d 'Start the guest that was created'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "counters" -d 'Print what the guest\'s devices have counted'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "create" -d 'Define a guest'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "delete" -d 'Forget the guest'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "drain" -d 'Take a device or a memory zone from the guest, and wait until the host may have it'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "info" -d 'Print the guest\'s configuration and state'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "metrics" -d 'Print numbers for a monitoring system'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "nmi" -d 'Send the guest a non-maskable interrupt, as for a dump of its memory'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "pause" -d 'Hold the guest'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "ping" -d 'Print who answers'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "power-button" -d 'Press the guest\'s power button'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "reboot" -d 'Take the guest down and start it again'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "regions" -d 'Print where the guest\'s memory is, and who has it'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "remove-device" -d 'Ask the guest to give up a device'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "resize" -d 'Change how much the guest has'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "resize-disk" -d 'Make a disk of the guest larger'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "resume" -d 'Let the guest go on'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "shutdown" -d 'Take the guest down'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "shutdown-vmm" -d 'End the daxhund'
complete -c daxhund-remote -n "__fish_daxhund_remote_needs_command" -f -a "watch" -d 'Show what the guest does, again and again, until it goes'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand add-device" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand add-disk" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand add-fs" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand add-generic-vhost-user" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand add-net" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand add-pmem" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand add-vsock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand boot" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand counters" -l json -d 'Print JSON, one object on one line'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand counters" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand create" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand delete" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand drain" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand info" -l json -d 'Print JSON, one object on one line'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand info" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand metrics" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand nmi" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand pause" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand ping" -l json -d 'Print JSON, one object on one line'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand ping" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand power-button" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand reboot" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand regions" -l json -d 'Print JSON, one object on one line'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand regions" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand remove-device" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand resize" -l balloon -d 'How much the balloon takes' -r
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand resize" -l cpus -d 'How many vCPUs' -r
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand resize" -l memory -d 'How much RAM' -r
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand resize" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand resize-disk" -l disk -d 'The disk\'s name' -r
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand resize-disk" -l size -d 'How much the guest is to have' -r
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand resize-disk" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand resume" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand shutdown" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand shutdown-vmm" -s h -l help -d 'Print help'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand watch" -l interval -d 'From one time to the next' -r
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand watch" -l count -d 'End when it was shown so often' -r
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand watch" -l json -d 'Print JSON, one object on one line'
complete -c daxhund-remote -n "__fish_daxhund_remote_using_subcommand watch" -s h -l help -d 'Print help'
