set -u
# {{ signal_s }} s before the time is up (a minute earlier at most) only this shell gets SIGUSR1. Until the step runs, a
# signal is noted.
warned= left= step= sent=
seconds_left() { # until the limit; nothing where there is none
    [[ $(squeue --noheader --jobs="{{ job }}" --format=%L) =~ ^\ *(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)\ *$ ]] || return
    local part=("${BASH_REMATCH[@]}")
    echo $((((10#${part[2]:-0} * 24 + 10#${part[4]:-0}) * 60 + 10#${part[5]}) * 60 + 10#${part[6]}))
}
pass_on() { sent=$1; [ -z "$step" ] || kill -"$1" "$step"; }
trap 'warned=1; pass_on USR1; left=$(seconds_left)' USR1
trap 'pass_on TERM' TERM

cd {{ cwd | sh }} || exit 1
export PYTHONUNBUFFERED=1
export PYTHONSAFEPATH=1
{% if python_path %}
export PYTHONPATH={{ python_path | sh }}
{% endif %}
export PATH={{ bin | sh }}:$PATH
