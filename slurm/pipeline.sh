#!/bin/bash
# The whole experiment as a chain of jobs; each starts when the one before it has succeeded. Prints "stage job-id".
#   slurm/pipeline.sh RECIPE [ARM ...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
recipe=${1:?usage: slurm/pipeline.sh RECIPE [ARM ...]}
arms=("${@:2}")
[ ${#arms[@]} -gt 0 ] || arms=(sft atlantis)

# chain STAGE JOB-IDS SCRIPT ARGUMENT...: submit after these jobs (joined by colons), leave the id in $job.
chain() {
    job=$(sbatch --parsable ${2:+"--dependency=afterok:$2"} --kill-on-invalid-dep=yes "$here/$3" "${@:4}")
    echo "$1 $job"
}

chain prepare "" prepare.sbatch "$recipe"
chain reference "$job" train.sbatch "$recipe" reference # ends at once where the reference is a ready checkpoint
chain score "$job" score.sbatch "$recipe"
chain merge "$job" merge.sbatch "$recipe"
merged=$job
trained=
for arm in "${arms[@]}"; do
    chain "train-$arm" "$merged" train.sbatch "$recipe" "$arm"
    trained+=${trained:+:}$job
done
chain evaluate "$trained" evaluate.sbatch "$recipe" "${arms[@]}"
