# bash completion for mountctl(1)

_mountctl_digests() {
  mountctl image list --json 2>/dev/null | python3 -IS -c '
import json, sys
for image in json.load(sys.stdin).get("images", ()):
    print(sys.argv[1] + image["digest"])
' "$1" 2>/dev/null
}

_mountctl_words() {
  mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur")
}

_mountctl_stored() {
  # Asking the daemon is for whoever has begun to write one.
  mapfile -t COMPREPLY < <(compgen -W "$(_mountctl_digests "$1")" -- "$cur")
  __ltrim_colon_completions "$cur"
}

_mountctl_source() {
  case $cur in
    s*:* | stored*) _mountctl_stored stored: ;;
    composefs:*)
      cur=${cur#composefs:}
      _filedir
      COMPREPLY=("${COMPREPLY[@]/#/composefs:}")
      __ltrim_colon_completions "composefs:$cur"
      ;;
    *)
      _filedir
      [ -n "$cur" ] || COMPREPLY+=(stored: oci: composefs: tmpfs:)
      [[ ${COMPREPLY[*]} != *: ]] || compopt -o nospace
      ;;
  esac
}

_mountctl() {
  local cur prev words cword verb='' sub='' index options=''
  _init_completion -n := || return
  local request='--json --read-write --type --options --idmap --layer --top --objects --digest --check-contents --signature
    --image-policy --verity --root-hash --root-hash-signature --interactive --help'
  local -a positional=()
  for ((index = 1; index < cword; index++)); do
    case ${words[index]} in
      --) [ "$verb" != run ] || { _command_offset $((index + 1)); return; } ;;
      -t | --type | -o | --options | --idmap | --layer | --top | --objects | --userns | --signature | --key-file | --image-policy | --verity | --root-hash | \
        --root-hash-signature | --name | --age | --output | --digest | --uid | --as) ((index++)) ;;
      -*) ;;
      *) if [ -z "$verb" ]; then verb=${words[index]}
        elif [[ $verb == @(policy|image) && -z $sub ]]; then sub=${words[index]}
        else positional+=("${words[index]}"); fi ;;
    esac
  done
  if [ -z "$verb" ]; then
    _mountctl_words 'mount umount run explain list revoke policy image status metrics doctor --help --version'
    return
  fi
  case $prev in
    -t | --type) _mountctl_words 'erofs squashfs ext4 xfs btrfs tmpfs'; return ;;
    --idmap) _mountctl_words 'none namespace caller'; return ;;
    -o | --options) _mountctl_words 'ro rw nosuid nodev noexec nosymfollow noatime nodiratime'; return ;;
    --layer | --signature | --key-file | --verity | --root-hash-signature | --output | --userns) _filedir; return ;;
    --objects) _filedir -d; return ;;
    --top) _filedir -d; [[ tmpfs: != "$cur"* ]] || COMPREPLY+=(tmpfs:); return ;;
    --digest) [ "$verb" != revoke ] || _mountctl_stored ''; return ;;
    --as | --uid) mapfile -t COMPREPLY < <(compgen -u -- "$cur"); return ;;
    --image-policy | --root-hash | --name | --age) return ;;
  esac
  case $verb/$sub in
    mount/) options="$request --key-file --userns" ;;
    explain/) options="$request --userns --as" ;;
    run/) options="$request --key-file" ;;
    umount/) options='--lazy --json --help' ;;
    list/) options='--all --long --json --help' ;;
    revoke/) options='--digest --uid --json --help' ;;
    metrics/) options='--output --json --help' ;;
    status/ | doctor/) options='--json --help' ;;
    policy/) _mountctl_words 'check show schema reload --help'; return ;;
    image/) _mountctl_words 'import pull list inspect verify remove gc --help'; return ;;
    policy/schema) options='--help' ;;
    image/import) options='--name --signature --interactive --json --help' ;;
    image/gc) options='--age --json --help' ;;
    policy/* | image/*) options='--json --help' ;;
  esac
  if [[ $cur == -* ]]; then
    _mountctl_words "$options"
    return
  fi
  case $verb/$sub in
    mount/) if ((${#positional[@]} == 0)); then _mountctl_source; else _filedir -d; fi ;;
    explain/) _mountctl_source ;;
    run/) if ((${#positional[@]} == 0)); then _mountctl_source; fi ;;
    umount/ | policy/check | policy/show) _filedir -d ;;
    image/import) _filedir ;;
    image/inspect | image/verify | image/remove) _mountctl_stored '' ;;
  esac
} && complete -F _mountctl mountctl
