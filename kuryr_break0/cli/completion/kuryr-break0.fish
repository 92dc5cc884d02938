# Completion of kuryr-break0 for fish.
complete -c kuryr-break0 -n __fish_use_subcommand -f
complete -c kuryr-break0 -n __fish_use_subcommand -l help
complete -c kuryr-break0 -n __fish_use_subcommand -l help-all
complete -c kuryr-break0 -n __fish_use_subcommand -l version
complete -c kuryr-break0 -n __fish_use_subcommand -l debug
complete -c kuryr-break0 -n __fish_use_subcommand -l config-file -rF
complete -c kuryr-break0 -n __fish_use_subcommand -l config-dir -rF
complete -c kuryr-break0 -n __fish_use_subcommand -a status -d 'show break0 and the bound addresses'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l wide
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l problems
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l pod -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l owner -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l origin -xa 'kuryr cni manual discovered'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l wait
complete -c kuryr-break0 -n '__fish_seen_subcommand_from status' -l watch
complete -c kuryr-break0 -n __fish_use_subcommand -a probe -d 'ping a container from the node, and the node from it'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l all
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l tcp -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l conflict
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l trace
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l count -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l timeout -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from probe' -l wide
complete -c kuryr-break0 -n __fish_use_subcommand -a doctor -d 'find faults on this node, and remedies'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from doctor' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from doctor' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from doctor' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from doctor' -l ignore -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from doctor' -l no-probe
complete -c kuryr-break0 -n '__fish_seen_subcommand_from doctor' -l bundle -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from doctor' -l redact
complete -c kuryr-break0 -n __fish_use_subcommand -a check -d 'check whether break0 will work on this node'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from check' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from check' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from check' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from check' -l parent -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from check' -l ignore -r
complete -c kuryr-break0 -n __fish_use_subcommand -a sync -d 'repair everything once'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from sync' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from sync' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from sync' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from sync' -l dry-run
complete -c kuryr-break0 -n '__fish_seen_subcommand_from sync' -l claim
complete -c kuryr-break0 -n '__fish_seen_subcommand_from sync' -l delete-unclaimed
complete -c kuryr-break0 -n __fish_use_subcommand -a agent -d 'repair everything continuously'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from agent' -l help
complete -c kuryr-break0 -n __fish_use_subcommand -a bind -d 'make the addresses of a container reachable'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from bind' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from bind' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from bind' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from bind' -l owner -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from bind' -l ifname -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from bind' -l netns -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from bind' -l mac -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from bind' -l parent -r
complete -c kuryr-break0 -n __fish_use_subcommand -a unbind -d 'revert bind'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from unbind' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from unbind' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from unbind' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from unbind' -l owner -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from unbind' -l ifname -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from unbind' -l pod -r
complete -c kuryr-break0 -n __fish_use_subcommand -a adopt -d 'bind pods that are already running'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from adopt' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from adopt' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from adopt' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from adopt' -l dry-run
complete -c kuryr-break0 -n '__fish_seen_subcommand_from adopt' -l wide
complete -c kuryr-break0 -n __fish_use_subcommand -a cleanup -d 'delete everything that kuryr-break0 has created'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cleanup' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cleanup' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cleanup' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cleanup' -l dry-run
complete -c kuryr-break0 -n __fish_use_subcommand -a cni -d 'run as a CNI plugin, after macvlan'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cni' -l help
complete -c kuryr-break0 -n __fish_use_subcommand -a cni-install -d 'install the CNI plugin'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cni-install' -l help
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cni-install' -l json
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cni-install' -l output -xa 'json yaml'
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cni-install' -l bin-dir -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cni-install' -l shim -r
complete -c kuryr-break0 -n '__fish_seen_subcommand_from cni-install' -l without-agent
