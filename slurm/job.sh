# shellcheck shell=bash disable=SC2034,SC2154
# What the scripts of this folder share, the site's environment first.

# A line of environment.sh that fails, such as a module that is not there, would leave the job with whatever python the
# node has. What fails inside of files that it sources is theirs.
unfit() { # LINE FILE
    [[ $2 != */environment.sh ]] || { echo "megahp: line $1 of $2 failed: $(sed -n "$1p" "$2"); mend it" >&2 && exit 2; }
}
trap 'unfit "$LINENO" "${BASH_SOURCE[0]}"' ERR
[ -e "$MEGAHP_SLURM/environment.sh" ] || exit 2
source "$MEGAHP_SLURM/environment.sh" # in no list: there bash passes over what fails
trap - ERR

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # an element, which may have the array's own number
job=${job:-$SLURM_JOB_ID}
logs=${logs:-.}
# of each task, as many as the smallest node has: 4(x3),2 is 2
least=$(tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE}" | cut -d '(' -f 1 | sort -n | head -n 1)
cpus=$((least / ${SLURM_NTASKS_PER_NODE:-1}))
cpus=${SLURM_CPUS_PER_TASK:-$((cpus > 0 ? cpus : 1))}
# srun takes none of these from sbatch. A log a node. A rank that fails leaves the others time to say why, and no more.
step=(--cpus-per-task="$cpus" --cpu-bind=cores --kill-on-bad-exit=0 --wait=30)
step+=(--output="$logs/%x-%j-%n.out" --open-mode=append "${srun_options[@]}")

# Where the ranks meet: the first node, which runs this script too, and a port that is free there. And the secret by which
# they know each other, of this life of the job alone: srun hands it on, and no file, log or command line has it.
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

# The site's check of all nodes, where there is one.
check() {
    [ ${#preflight[@]} = 0 ] || srun "${step[@]}" "${container[@]}" "${preflight[@]}"
}

# End this job, or queue it again, as training's exit code says (docs/faults.md).
end() { # CODE RUN.toml [section.key=value ...]
    [ "$1" != 0 ] || exit 0
    alone requeue "$@" --restarts "$restarts" || exit
    trap '' TERM # which Slurm now sends, and there is one thing to do yet
    requeue "$1"
    leave_out "$job"
}

# Queue this job again. Where Slurm refuses that, it ends with what its training did.
requeue() { # CODE
    scontrol requeue "$job" && return
    echo "megahp: Slurm has not queued job $job again; go on with the same sbatch" >&2
    exit "$1"
}

# The number of the job in what sbatch --parsable printed: 12, 12;cluster, with a site's own lines around it.
id_of() { # TEXT
    grep -oEm 1 '^[0-9]+(;[^ ]*)?$' <<<"$1" | cut -d ';' -f 1
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
    local nodes
    nodes=$(bad_nodes)
    [ -z "$nodes" ] || scontrol update JobId="$1" ExcNodeList="$nodes"
}

# The nodes named as bad, by commas, without those that Slurm does not know: one of them, and it would exclude none.
bad_nodes() {
    [ -s "$exclude" ] || return 0
    local known
    known=$(sinfo -h -N -o %N | sort -u)
    grep -vxF "$known" "$exclude" | sed "s|.*|megahp: $exclude names &, which Slurm does not know|" >&2
    grep -xF "$known" "$exclude" | paste -sd,
}

# Another number of nodes for a pending job that has one task a rank.
resize() { # JOB NODES [more]
    local ranks=$(($2 * RANKS_PER_NODE)) # Slurm leaves these as they were, and makes CPUs enough for the tasks
    scontrol update JobId="$1" NumNodes="$2-$2" NumTasks="$ranks" NumCPUs="$ranks" "${@:3}"
}
