# fish completion for mountctl(1)

function __mountctl_digests
    mountctl image list --json 2>/dev/null | python3 -IS -c '
import json, sys
for image in json.load(sys.stdin).get("images", ()):
    print(sys.argv[1] + image["digest"] + "\t" + (image.get("name") or "image"))
' "$argv[1]" 2>/dev/null
end

# Whether the words so far are exactly these verbs, options aside.
function __mountctl_verbs
    set -l seen
    for word in (commandline -opc)[2..-1]
        string match -q -- '-*' $word; or set -a seen $word
    end
    test "$seen" = "$argv"
end

function __mountctl_in
    set -l seen
    for word in (commandline -opc)[2..-1]
        string match -q -- '-*' $word; or set -a seen $word
    end
    test (count $seen) -ge (count $argv); and test "$seen[1..$(count $argv)]" = "$argv"
end

function __mountctl_any
    for verb in $argv
        __mountctl_in $verb; and return 0
    end
    return 1
end

function __mountctl_stored_source
    __mountctl_any mount run explain; and string match -q 's*' -- (commandline -ct)
end

# Where a source is expected, and nothing of it is there yet.
function __mountctl_any_source
    __mountctl_verbs mount; or __mountctl_verbs run; or __mountctl_verbs explain; and test -z (commandline -ct)
end

complete -c mountctl -n '__mountctl_verbs' -f
complete -c mountctl -n '__mountctl_any policy image list revoke status metrics doctor' -f
complete -c mountctl -s h -l help -d 'print the options'
complete -c mountctl -n '__mountctl_verbs' -l version -d 'print the version'
complete -c mountctl -n '__mountctl_verbs' -a mount -d 'mount an image at a directory'
complete -c mountctl -n '__mountctl_verbs' -a umount -d 'detach what mount has mounted'
complete -c mountctl -n '__mountctl_verbs' -a run -d 'run a command in an image'
complete -c mountctl -n '__mountctl_verbs' -a explain -d 'say whether an image could be mounted'
complete -c mountctl -n '__mountctl_verbs' -a list -d 'list your mounts'
complete -c mountctl -n '__mountctl_verbs' -a revoke -d 'detach mounts wherever they are attached'
complete -c mountctl -n '__mountctl_verbs' -a policy -d 'check, show and reload policy files'
complete -c mountctl -n '__mountctl_verbs' -a image -d 'the store for images'
complete -c mountctl -n '__mountctl_verbs' -a status -d 'say how the daemon does'
complete -c mountctl -n '__mountctl_verbs' -a metrics -d 'print the counters of the daemon'
complete -c mountctl -n '__mountctl_verbs' -a doctor -d 'check whether everything is there'

set -l request '__mountctl_any mount run explain'
complete -c mountctl -n $request -s w -l read-write -d 'ask for a writable mount'
complete -c mountctl -n $request -s t -l type -x -a 'erofs squashfs ext4 xfs btrfs tmpfs' -d 'refuse another type'
complete -c mountctl -n $request -s o -l options -x -a 'ro rw nosuid nodev noexec nosymfollow noatime nodiratime' -d 'mount options'
complete -c mountctl -n $request -l idmap -x -a 'none namespace caller' -d 'how to map ids'
complete -c mountctl -n $request -l layer -r -F -d 'what to lay over it'
complete -c mountctl -n $request -l top -x -a '(printf "tmpfs\tin memory\n"; __fish_complete_directories)' -d 'what takes what is written'
complete -c mountctl -n $request -l objects -x -a '(__fish_complete_directories)' -d 'where the contents of a composefs lie'
complete -c mountctl -n $request -l digest -x -d 'the digest that a composefs has to have'
complete -c mountctl -n $request -l check-contents -d 'have fs-verity check the contents of a composefs'
complete -c mountctl -n $request -l signature -r -F -d 'a detached signature of the image'
complete -c mountctl -n '__mountctl_any mount run' -l key-file -r -F -d 'the password of an encrypted image'
complete -c mountctl -n $request -l image-policy -x -d 'what to demand of the image'
complete -c mountctl -n $request -l verity -r -F -d 'hash data of dm-verity'
complete -c mountctl -n $request -l root-hash -x -d 'the root hash of the hash data'
complete -c mountctl -n $request -l root-hash-signature -r -F -d 'a signature of the root hash'
complete -c mountctl -n '__mountctl_any mount run explain; or __mountctl_in image import' -l interactive -d 'have an administrator asked'
complete -c mountctl -n '__mountctl_any explain' -l as -x -a '(__fish_complete_users)' -d 'for another user, as root'
complete -c mountctl -n '__mountctl_any mount explain' -l userns -r -F -d 'user namespace to map ids for'
complete -c mountctl -n __mountctl_stored_source -a '(__mountctl_digests stored:)'
complete -c mountctl -n __mountctl_any_source -a 'stored: oci: composefs: tmpfs:' -d 'another kind of source'
complete -c mountctl -n '__mountctl_in umount' -f -a '(__fish_complete_directories (commandline -ct) "")'
complete -c mountctl -n '__mountctl_in umount' -s l -l lazy -d 'also if it is in use'
complete -c mountctl -n '__mountctl_in list' -l all -d 'those of all users'
complete -c mountctl -n '__mountctl_in list' -s l -l long -d 'all that is known about each'
complete -c mountctl -n '__mountctl_in revoke' -l digest -x -a '(__mountctl_digests "")' -d 'all of an image'
complete -c mountctl -n '__mountctl_in revoke' -l uid -x -a '(__fish_complete_users)' -d 'all of a user'
complete -c mountctl -n '__mountctl_in metrics' -l output -r -F -d 'replace a file with them'

complete -c mountctl -n '__mountctl_verbs policy' -a 'check show schema reload'
complete -c mountctl -n '__mountctl_in policy check; or __mountctl_in policy show' -F
complete -c mountctl -n '__mountctl_verbs image' -a 'import pull list inspect verify remove gc'
complete -c mountctl -n '__mountctl_in image import' -l name -x -d 'what to call it'
complete -c mountctl -n '__mountctl_in image import' -l signature -r -F -d 'a signature of the image'
complete -c mountctl -n '__mountctl_in image import' -F
complete -c mountctl -n '__mountctl_in image gc' -l age -x -d 'for how long, such as 30d'
complete -c mountctl -n '__mountctl_verbs image inspect; or __mountctl_verbs image verify; or __mountctl_verbs image remove' -a '(__mountctl_digests "")'
complete -c mountctl -n '__mountctl_any mount umount run explain list revoke status metrics doctor image; or __mountctl_in policy check; or __mountctl_in policy show; or __mountctl_in policy reload' -l json -d 'print JSON, for errors as well'
