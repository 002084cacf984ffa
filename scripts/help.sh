# Sourced by the other scripts: --help or -h prints the comment at the head of the script that was started, and ends it.
for argument in "$@"; do
  case $argument in
    -h | --help)
      awk 'NR > 1 { if (!/^#/ || /^#SBATCH/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[-1]}"
      exit 0
      ;;
  esac
done
