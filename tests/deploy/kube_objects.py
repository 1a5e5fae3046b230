"""What the tests look for in Kubernetes objects. Standard library only."""


def pod_templates(value):
    """The pod templates inside an object; the definition of a custom resource may have left their details out."""
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            yield value
        else:
            for inner in value.values():
                yield from pod_templates(inner)
