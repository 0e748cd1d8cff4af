"""Talks to mountd with nothing but the varlink package's own client; prints what it found as JSON."""

import json
import sys

import varlink

found = {}
with varlink.Client(address=f"unix:{sys.argv[1]}") as client:
    with client.open("org.varlink.service") as service:
        found["info"] = service.GetInfo()
        found["descriptions"] = {
            name: service.GetInterfaceDescription(name)["description"]
            for name in found["info"]["interfaces"]
        }
    # The client has a method for each that the description declares.
    with client.open("io.mountd.Mount") as mount:
        found["explained"] = mount.Explain(source={"tmpfs": {"size": 4096}})
        for name, source in (("Mount", {"tmpfs": {"size": 4096}}), ("Explain", {"imageFileDescriptor": 0})):
            try:
                getattr(mount, name)(source=source)
            except varlink.VarlinkError as error:
                found[name] = [error.error(), error.parameters()]
json.dump(found, sys.stdout)
