# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_daxhund_global_optspecs
    string join \n cpus= numa= platform= memory= memory-zone= pmem= device= disk= net= fs= generic-vhost-user= vsock= balloon= rng= kernel= initramfs= cmdline= serial= console= api-socket= event-monitor= removal-guard= seccomp= log-file= v V/version h/help
end

function __fish_daxhund_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_daxhund_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_daxhund_using_subcommand
    set -l cmd (__fish_daxhund_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c daxhund -n "__fish_daxhund_needs_command" -l cpus -d 'Virtual processors [default: boot=1]' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l numa -d 'A guest NUMA node; repeat for more' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l platform -d 'The machine as a whole' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l memory -d 'RAM of the host\'s own memory [default: size=512M]' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l memory-zone -d 'A piece of RAM and what backs it; repeat for more' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l pmem -d 'Persistent memory of the guest; repeat for more' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l device -d 'A PCI function of the host, passed through; repeat for more' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l disk -d 'A disk of the guest; repeat for more' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l net -d 'A network interface of the guest; repeat for more' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l fs -d 'A directory of the host; repeat for more' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l generic-vhost-user -d 'A device of whatever type that a vhost-user backend serves; repeat for more' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l vsock -d 'Sockets between guest and host' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l balloon -d 'Memory that the guest lends back to the host' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l rng -d 'Where random numbers come from [default: src=/dev/urandom]' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l kernel -d 'Kernel to boot: a bzImage, or an ELF kernel with a PVH entry' -r -F
complete -c daxhund -n "__fish_daxhund_needs_command" -l initramfs -d 'Initial RAM file system' -r -F
complete -c daxhund -n "__fish_daxhund_needs_command" -l cmdline -d 'Kernel command line' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l serial -d 'Serial port: off, null, tty, pty, file=PATH or socket=PATH [default: tty]' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l console -d 'Virtio console: off, null, tty, pty, file=PATH or socket=PATH [default: off]' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l api-socket -d 'Serve the REST API on a unix socket; the guest may come by it' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l event-monitor -d 'Write events as JSON to path=PATH or fd=N' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l removal-guard -d 'Who holds removals of device-dax memory until the guest has let go: on (a helper), off, daemon [default: what there is]' -r
complete -c daxhund -n "__fish_daxhund_needs_command" -l seccomp -d 'System call filter; only false is supported yet' -r -f -a "true\t''
false\t''
log\t''"
complete -c daxhund -n "__fish_daxhund_needs_command" -l log-file -d 'Write the log to a file instead of standard error' -r -F
complete -c daxhund -n "__fish_daxhund_needs_command" -s v -d 'Log more: -v info, -vv debug, -vvv trace; warnings are always logged'
complete -c daxhund -n "__fish_daxhund_needs_command" -s V -l version -d 'Print the version'
complete -c daxhund -n "__fish_daxhund_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c daxhund -n "__fish_daxhund_needs_command" -f -a "doctor" -d 'Check what this host needs to run guests on device-dax memory'
complete -c daxhund -n "__fish_daxhund_needs_command" -f -a "guard" -d 'What holds the removal of device-dax memory back'
complete -c daxhund -n "__fish_daxhund_needs_command" -f -a "pool" -d 'The host\'s pools of device-dax memory'
complete -c daxhund -n "__fish_daxhund_using_subcommand doctor" -l json -d 'Print JSON instead of a table'
complete -c daxhund -n "__fish_daxhund_using_subcommand doctor" -s h -l help -d 'Print help'
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and not __fish_seen_subcommand_from list release serve" -s h -l help -d 'Print help'
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and not __fish_seen_subcommand_from list release serve" -f -a "list" -d 'List what is held, by whom, and who waits'
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and not __fish_seen_subcommand_from list release serve" -f -a "release" -d 'Have the users of a device let go of it, then take it from its driver'
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and not __fish_seen_subcommand_from list release serve" -f -a "serve" -d 'Serve the VMM that started this'
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and __fish_seen_subcommand_from list" -l socket -d 'Where the guard listens' -r -F
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and __fish_seen_subcommand_from list" -l json -d 'Print JSON instead of a table'
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and __fish_seen_subcommand_from release" -l socket -d 'Where the guard listens' -r -F
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and __fish_seen_subcommand_from release" -s h -l help -d 'Print help'
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and __fish_seen_subcommand_from serve" -l fd -d 'The connection' -r
complete -c daxhund -n "__fish_daxhund_using_subcommand guard; and __fish_seen_subcommand_from serve" -s h -l help -d 'Print help'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and not __fish_seen_subcommand_from list free reserve" -s h -l help -d 'Print help'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and not __fish_seen_subcommand_from list free reserve" -f -a "list" -d 'List pools, their devices, and who has what of them'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and not __fish_seen_subcommand_from list free reserve" -f -a "free" -d 'List what is free'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and not __fish_seen_subcommand_from list free reserve" -f -a "reserve" -d 'Take a range, print its device, offset and size in bytes, and hold it: until the pipe or socket that is standard input is closed at its other end, or until a signal'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and __fish_seen_subcommand_from list" -l json -d 'Print JSON instead of text'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and __fish_seen_subcommand_from free" -l json -d 'Print JSON instead of text'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and __fish_seen_subcommand_from free" -s h -l help -d 'Print help'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and __fish_seen_subcommand_from reserve" -l size -d 'How much' -r
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and __fish_seen_subcommand_from reserve" -l node -d 'The host node that it is to be of [default: any]' -r
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and __fish_seen_subcommand_from reserve" -l json -d 'Print JSON instead of text'
complete -c daxhund -n "__fish_daxhund_using_subcommand pool; and __fish_seen_subcommand_from reserve" -s h -l help -d 'Print help'
