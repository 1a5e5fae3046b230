"""Validates Kubernetes objects: core kinds against the bundled schemas of a Kubernetes version, custom ones against
the definitions of their projects. Run by the interpreter of build/tools/venv (deploy/tools makes it).

    kube_schema.py --crds DIR --version 1.34 FILE..

Unknown fields are errors, as with kubectl's strict validation. One line for every object that is wrong, and then exit
code 1.
"""

import argparse
import json
import pathlib
import sys

import jsonschema
import kubernetes_validate
import yaml
from kube_objects import pod_templates


def closed(schema):
    """A copy of a definition's schema in which fields that it does not name are errors: the API server drops them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and isinstance(schema["properties"], dict) and schema.get("type") == "object":
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            copy.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        copy.pop("type", None)
    return copy


def read_definitions(folder):
    """(apiVersion, kind) -> schema, of every served version."""
    schemas = {}
    for path in sorted(pathlib.Path(folder).glob("*.yaml")):
        for crd in yaml.safe_load_all(path.read_text()):
            if not crd or crd["kind"] != "CustomResourceDefinition":
                continue
            spec = crd["spec"]
            for version in spec["versions"]:
                schema = closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return schemas


def check(document, definitions, version):
    custom = definitions.get((document["apiVersion"], document["kind"]))
    if custom is None:
        kubernetes_validate.validate(document, version, strict=True)
        return
    jsonschema.Draft7Validator(custom).validate(document)
    for template in pod_templates(document["spec"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crds", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    definitions = read_definitions(args.crds)
    wrong = n = 0
    seen = set()  # values files differ in few objects
    for path in args.files:
        for document in yaml.safe_load_all(pathlib.Path(path).read_text()):
            text = json.dumps(document, sort_keys=True)
            if not document or text in seen:
                continue
            seen.add(text)
            n += 1
            try:
                check(document, definitions, args.version)
            except (jsonschema.ValidationError, kubernetes_validate.ValidationError,
                    kubernetes_validate.InvalidSchemaError, kubernetes_validate.SchemaNotFoundError) as error:
                wrong += 1
                where = ".".join(str(part) for part in getattr(error, "path", []))
                print(f"{path}: {document['kind']} {document['metadata']['name']}: {where}: "
                      f"{str(getattr(error, 'message', error))[:300]}")
    print(f"{n} different objects, {wrong} wrong, Kubernetes {args.version}")
    return 1 if wrong or not n else 0


if __name__ == "__main__":
    sys.exit(main())
