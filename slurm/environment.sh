# shellcheck shell=bash disable=SC2034
# Site configuration: every job of this folder sources this file first, in the folder it was submitted from. It is the
# only file to edit. Unchanged it works wherever `python -m megahp` runs on the nodes as it does where the job is
# submitted. To leave megahp's copy alone, copy this folder and set MEGAHP_SLURM to your copy.

# Python. sbatch passes on the environment it is called in, an activated one too.
# module load cuda/12.8
# source .venv/bin/activate

export SLURM_EXPORT_ENV=ALL # to the ranks, even where jobs start without their submitter's environment (--export=NONE)

# Container: options to srun for pyxis (enroot), a command prefix for apptainer.
srun_options=()
# srun_options=(--container-image=/images/megahp.sqsh --container-mounts="$PWD" --container-workdir="$PWD")
container=()
# container=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" /images/megahp.sif)

# A check of all nodes before training. If it fails, the job is queued again. Nodes listed in the file, one per line,
# are excluded from then on; `megahp launch` excludes them from the start.
exclude=${exclude:-bad-nodes.txt}
preflight=()
# preflight=(python -m megahp check-cluster --device cuda --exclude-file "$exclude")

restarts=20 # after faults; a requested stop, as at the time limit, does not count

# NCCL and fabric. Commented lines have no value that is right everywhere.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 # where nodes have several networks
# export NCCL_IB_HCA=mlx5_0,mlx5_1                     # the adapters that belong to the job
# export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7        # large fabrics; 2^22 x 4.096 us = 17 s
# export NCCL_IB_GID_INDEX=3 NCCL_IB_TC=106            # RoCE: ask the operators of the switches
# export FI_PROVIDER=efa FI_EFA_USE_HUGE_PAGE=0        # AWS, with the aws-ofi-nccl plugin
# export FI_PROVIDER=cxi NCCL_NET="AWS Libfabric"      # HPE Slingshot, with the same plugin
# export CUDA_DEVICE_MAX_CONNECTIONS=1                 # tensor or context parallel without FSDP, before Blackwell

export PYTHONUNBUFFERED=1    # write logs immediately
export PYTHONFAULTHANDLER=1  # print the stack of a crash in C++
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-$USER}" # on the node: many ranks overload a shared cache
ulimit -c 0 # no core files of 80 GB
