# shellcheck shell=bash disable=SC2034,SC2154
# Functions and variables that the scripts of this folder share. Sources the site's environment first.

# Stop if a line of environment.sh fails, such as a missing module: the job would run with whatever python the node has.
# Failures inside files that environment.sh sources are ignored.
unfit() { # LINE FILE
    [[ $2 != */environment.sh ]] || { echo "megahp: line $1 of $2 failed: $(sed -n "$1p" "$2"); fix it" >&2 && exit 2; }
}
trap 'unfit "$LINENO" "${BASH_SOURCE[0]}"' ERR
[ -e "$MEGAHP_SLURM/environment.sh" ] || exit 2
source "$MEGAHP_SLURM/environment.sh" # not in an && or || list: there bash ignores errors
trap - ERR

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # SLURM_JOB_ID may be the array's own
job=${job:-$SLURM_JOB_ID}
logs=${logs:-.}
# CPUs per task: those of the smallest node, since nodes may differ; "4(x3),2" gives 2
least=$(tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE}" | cut -d '(' -f 1 | sort -n | head -n 1)
cpus=$((least / ${SLURM_NTASKS_PER_NODE:-1}))
cpus=${SLURM_CPUS_PER_TASK:-$((cpus > 0 ? cpus : 1))}
# srun inherits none of these from sbatch. One log per node. After a rank fails the others have 30 s to report why.
step=(--cpus-per-task="$cpus" --cpu-bind=cores --kill-on-bad-exit=0 --wait=30)
step+=(--output="$logs/%x-%j-%n.out" --open-mode=append "${srun_options[@]}")

# Set the rendezvous: the first node, which runs this script too, and a port that is free there. Draw the secret by
# which ranks authenticate each other, for this start of the job only: srun passes it on; no file, log or command line
# has it.
rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    while taken localhost || taken "$MASTER_ADDR"; do MASTER_PORT=$((MASTER_PORT + 1)); done
    MEGAHP_SECRET=$(od -A n -N 32 -t x1 /dev/urandom | tr -d ' \n')
    export MASTER_ADDR MASTER_PORT MEGAHP_SECRET
}

taken() {
    (: <"/dev/tcp/$1/$MASTER_PORT") 2>/dev/null
}

# Run the site's check of all nodes, if there is one.
check() {
    [ ${#preflight[@]} = 0 ] || srun "${step[@]}" "${container[@]}" "${preflight[@]}"
}

# End this job or queue it again, depending on training's exit code (docs/faults.md).
end() { # CODE RUN.toml [section.key=value ...]
    [ "$1" != 0 ] || exit 0
    alone requeue "$@" --restarts "$restarts" || exit
    trap '' TERM # Slurm sends SIGTERM after the requeue; bad nodes are still to be excluded
    requeue "$1"
    leave_out "$job"
}

# Queue this job again. If Slurm refuses, exit with training's exit code.
requeue() { # CODE
    scontrol requeue "$job" && return
    echo "megahp: Slurm did not requeue job $job; submit the same sbatch again to resume" >&2
    exit "$1"
}

# Print the job id from the output of sbatch --parsable: 12 or 12;cluster, possibly among a site's own lines.
id_of() { # TEXT
    grep -oEm 1 '^[0-9]+(;[^ ]*)?$' <<<"$1" | cut -d ';' -f 1
}

# Run a megahp command as one process that ignores USR1, since Slurm sends the notice of the time limit to all steps.
alone() {
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_options[@]}" \
        bash -c 'trap "" USR1; exec "$@"' - "${container[@]}" python -m megahp "$@"
}

# Test whether a job was cancelled. squeue forgets a job after MinJobAge (300 s, as a rule); sacct does not.
cancelled() { # JOB
    [[ $(squeue -h -t all -j "$1" -o %T 2>/dev/null || sacct -n -X -j "$1" -o State 2>/dev/null) == *CANCELLED* ]]
}

# Exclude the bad nodes from a pending job.
leave_out() { # JOB
    local nodes
    nodes=$(bad_nodes)
    [ -z "$nodes" ] || scontrol update JobId="$1" ExcNodeList="$nodes"
}

# Print the bad nodes, comma-separated, without those that Slurm does not know: with one of these it would exclude none.
bad_nodes() {
    [ -s "$exclude" ] || return 0
    local known
    known=$(sinfo -h -N -o %N | sort -u)
    grep -vxF "$known" "$exclude" | sed "s|.*|megahp: $exclude names &, which Slurm does not know|" >&2
    grep -xF "$known" "$exclude" | paste -sd,
}

# Change the number of nodes of a pending job that has one task per rank.
resize() { # JOB NODES [more]
    local ranks=$(($2 * RANKS_PER_NODE)) # Slurm would keep the old numbers, and raises NumCPUs to what the tasks need
    scontrol update JobId="$1" NumNodes="$2-$2" NumTasks="$ranks" NumCPUs="$ranks" "${@:3}"
}
