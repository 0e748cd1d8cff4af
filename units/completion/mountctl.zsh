#compdef mountctl
# zsh completion for mountctl(1)

_mountctl_digests() {
  local -a digests
  digests=(${(f)"$(mountctl image list --json 2>/dev/null | python3 -IS -c '
import json, sys
for image in json.load(sys.stdin).get("images", ()):
    print(sys.argv[1] + image["digest"])
' "$1" 2>/dev/null)"})
  compadd -a digests
}

_mountctl_source() {
  if [[ $PREFIX == (stored|s*:)* ]]; then
    _mountctl_digests stored:
  elif compset -P composefs:; then
    _files
  else
    _files
    [[ -n $PREFIX ]] || compadd -S '' -- stored: oci: composefs: tmpfs:
  fi
}

_mountctl_request=(
  '--json[print JSON, for errors as well]'
  '(-w --read-write)'{-w,--read-write}'[ask for a writable mount]'
  '(-t --type)'{-t,--type}'[refuse another type of file system]:type:(erofs squashfs ext4 xfs btrfs tmpfs)'
  '*'{-o,--options}'[mount options]:option:(ro rw nosuid nodev noexec nosymfollow noatime nodiratime)'
  '--idmap[how to map ids]:kind:(none namespace caller)'
  '*--layer[what to lay over it]:file:_files'
  '--top[what takes what is written]:directory or tmpfs\:SIZE:_files -/'
  '*--objects[where the contents of a composefs lie]:directory:_files -/'
  '--digest[the digest that a composefs has to have]:digest:'
  '--check-contents[have fs-verity check the contents of a composefs]'
  '--signature[a detached signature of the image]:file:_files'
  '--image-policy[what to demand of the image]:policy:'
  '--verity[hash data of dm-verity]:file:_files'
  '--root-hash[the root hash of the hash data]:hash:'
  '--root-hash-signature[a signature of the root hash]:file:_files'
  '--interactive[have an administrator asked if need be]'
  '(-h --help)'{-h,--help}'[print the options]'
)
_mountctl_key=('--key-file[the password of an encrypted image]:file:_files')
_mountctl_common=('--json[print JSON, for errors as well]' '(-h --help)'{-h,--help}'[print the options]')

_mountctl_policy() {
  local -a verbs=(
    'check:say what is wrong with policy files'
    'show:print all rules and keys'
    'schema:print the JSON Schema of policy files'
    'reload:have the daemon read the policy again'
  )
  if ((CURRENT == 2)); then
    _describe verb verbs
    return
  fi
  shift words
  ((CURRENT--))
  case $words[1] in
    check | show) _arguments $_mountctl_common '*:directory:_files -/' ;;
    reload) _arguments $_mountctl_common ;;
    schema) _arguments '(-h --help)'{-h,--help}'[print the options]' ;;
  esac
}

_mountctl_image() {
  local -a verbs=(
    'import:copy an image into the store'
    'pull:pull an image from a registry'
    'list:list your images'
    'inspect:show what is known about an image'
    'verify:read an image anew'
    'remove:remove an image'
    'gc:remove images that nobody has used for long'
  )
  if ((CURRENT == 2)); then
    _describe verb verbs
    return
  fi
  shift words
  ((CURRENT--))
  case $words[1] in
    import) _arguments $_mountctl_common '--name[what to call it]:name:' '--interactive[have an administrator asked if need be]' '--signature[a signature]:file:_files' ':image:_files' ;;
    pull) _arguments $_mountctl_common ':reference:' ;;
    list) _arguments $_mountctl_common ;;
    inspect | verify | remove) _arguments $_mountctl_common ':digest: _mountctl_digests ""' ;;
    gc) _arguments $_mountctl_common '--age[for how long, such as 30d]:time:' ;;
  esac
}

_mountctl() {
  local -a verbs=(
    'mount:mount an image at a directory'
    'umount:detach what mount has mounted'
    'run:run a command in an image'
    'explain:say whether an image could be mounted, and why'
    'list:list your mounts'
    'revoke:detach mounts wherever they are attached'
    'policy:check, show and reload policy files'
    'image:the store for images'
    'status:say how the daemon does'
    'metrics:print the counters of the daemon'
    'doctor:check whether everything is there'
  )
  if ((CURRENT == 2)); then
    if [[ $PREFIX == -* ]]; then
      _arguments '(-h --help)'{-h,--help}'[print the options]' '--version[print the version]'
    else
      _describe verb verbs
    fi
    return
  fi
  shift words
  ((CURRENT--))
  case $words[1] in
    mount) _arguments $_mountctl_request $_mountctl_key '--userns[user namespace to map ids for]:path:_files' ':source:_mountctl_source' ':target:_files -/' ;;
    explain) _arguments $_mountctl_request '--userns[user namespace to map ids for]:path:_files' '--as[for another user, as root]:user:_users' ':source:_mountctl_source' ;;
    run) _arguments $_mountctl_request $_mountctl_key ':source:_mountctl_source' '*::command:_normal' ;;
    umount) _arguments $_mountctl_common '(-l --lazy)'{-l,--lazy}'[also if it is in use]' ':target:_files -/' ;;
    list) _arguments $_mountctl_common '--all[those of all users]' '(-l --long)'{-l,--long}'[all that is known about each]' ;;
    revoke) _arguments $_mountctl_common '--digest[all of an image]:digest: _mountctl_digests ""' '--uid[all of a user]:user:_users' ':id:' ;;
    metrics) _arguments $_mountctl_common '--output[replace a file with them]:file:_files' ;;
    status | doctor) _arguments $_mountctl_common ;;
    policy) _mountctl_policy ;;
    image) _mountctl_image ;;
  esac
}

if [[ $funcstack[1] == _mountctl ]]; then
  _mountctl "$@"
fi
