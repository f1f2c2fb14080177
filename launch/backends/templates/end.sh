step=$!
[ -z "$sent" ] || kill -"$sent" "$step" # srun passes it on, and the ranks save and stop

# Not `wait "$step"` alone: a signal that comes just before it would be handled only after the step.
while kill -0 "$step" 2>/dev/null; do sleep 0.5 & wait $!; done
wait "$step"
code=$?
case $code in 138 | 143) code=75 ;; esac # killed by USR1 or TERM before anything listened: nothing to save
lost=
{% if nodes > 1 %}
# When a node is lost, the ranks of the others fail in moments, and Slurm, which would requeue the job, knows it minutes later.
case $code in
    0 | 2 | 75) ;;
    *) timeout 120 srun --overlap --ntasks-per-node=1 true 2>/dev/null || lost=1 ;;
esac
{% endif %}
[ "$code" -eq 75 ] || [ -n "$lost" ] || exit "$code"
trap '' TERM USR1 # requeueing sends them to this script, and to scontrol

# Why it was stopped. Preemption signals the step only; Slurm requeues a job after its grace time, but not one that ends in it.
facts=$(scontrol show job "{{ job }}")
if [[ $facts =~ Restarts=([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
    echo "preempted, or its node was lost: Slurm requeued it"
    exit 75
fi
again="to go on: {{ again }}"
if [ -n "$lost" ]; then
    why="a node does not answer"
elif [[ $facts =~ PreemptTime=[0-9] ]]; then
    why="preempted"
elif [ -z "$warned" ]; then
    echo "stopped by a signal: not requeued, $again"
    exit 75
elif [ -n "$left" ] && [ "$left" -le {{ signal_s + 90 }} ]; then
    why="the time was up"
else
    why="stopped by SIGUSR1"
fi
if [ "$why" != preempted ] && [ -z "$lost" ] && [ "$(newest)" = "$before" ]; then
    [ "$why" = "the time was up" ] && again="because that would repeat forever; raise --time"
    echo "$why before a checkpoint was committed: not requeued, $again"
elif scontrol requeue "{{ job }}"; then
    echo "$why:${lost:+ not} saved, requeued; it resumes from the last checkpoint"
else
    echo "$why:${lost:+ not} saved, but scontrol could not requeue it, $again"
fi
exit 75
