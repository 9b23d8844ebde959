# shellcheck shell=bash disable=SC2034,SC2154
# What the scripts of this folder share.

logs=${logs:-.}
cpus=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / ${SLURM_NTASKS_PER_NODE:-1}))}
# srun takes none of these from sbatch. A log a node. A rank that fails leaves the others time to say why, and no more.
step=(--cpus-per-task="$cpus" --cpu-bind=cores --kill-on-bad-exit=0 --wait=30)
step+=(--output="$logs/%x-%j-%n.out" --open-mode=append "${srun_options[@]}")

# Where the ranks meet: the first node, which runs this script too, and a port that is free there.
rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    while taken localhost || taken "$MASTER_ADDR"; do MASTER_PORT=$((MASTER_PORT + 1)); done
    export MASTER_ADDR MASTER_PORT
}

taken() {
    (: <"/dev/tcp/$1/$MASTER_PORT") 2>/dev/null
}

# The site's check of all nodes, where there is one.
check() {
    [ ${#preflight[@]} = 0 ] || srun "${step[@]}" "${container[@]}" "${preflight[@]}"
}

# End this job, or queue it again, as training's exit code says (docs/faults.md).
end() { # CODE RUN.toml [section.key=value ...]
    [ "$1" != 0 ] || exit 0
    alone requeue "$@" --restarts "$restarts" || exit
    trap '' TERM # which Slurm now sends, and there is one thing to do yet
    scontrol requeue "$SLURM_JOB_ID"
    leave_out "$SLURM_JOB_ID"
}

# A command of megahp's as one process, which the notice that Slurm gives to all steps does not end.
alone() {
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_options[@]}" \
        bash -c 'trap "" USR1; exec "$@"' - "${container[@]}" python -m megahp "$@"
}

# Whether a job was cancelled. Slurm forgets it after MinJobAge (300 s, as a rule), accounting does not.
cancelled() { # JOB
    [[ $(squeue -h -t all -j "$1" -o %T 2>/dev/null || sacct -n -X -j "$1" -o State 2>/dev/null) == *CANCELLED* ]]
}

# Let a pending job begin without the nodes named as bad.
leave_out() { # JOB
    [ ! -s "$exclude" ] || scontrol update JobId="$1" ExcNodeList="$(paste -sd, "$exclude")"
}

# Another number of nodes for a pending job that has one task a rank.
resize() { # JOB NODES [more]
    local ranks=$(($2 * RANKS_PER_NODE)) # Slurm leaves these as they were, and makes CPUs enough for the tasks
    scontrol update JobId="$1" NumNodes="$2-$2" NumTasks="$ranks" NumCPUs="$ranks" "${@:3}"
}
