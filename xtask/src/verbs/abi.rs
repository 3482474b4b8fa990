//! `cargo xtask abi`: the interface as data, for test suites and tools that are not part of Deed.

use crate::tree::Tree;
use abi::Error;
use abi::host::{CALLS, DEED_UID, VERSION_MAJOR, VERSION_MINOR};
use abi::tables::{EXITS, Function, GUEST_CALLS, GUEST_PSCI, HOST_SMCS, WORDS, refusals};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Print the interface as JSON: every call with its number, arguments, results and errors.
///
/// docs/hypercalls.json is this output; `--json docs/hypercalls.json` makes it anew.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Write it to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(tree: &Tree, args: &Args) -> Result<bool> {
    let text = text()?;
    match &args.json {
        None => print!("{text}"),
        Some(path) => {
            std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
            println!("{} is written", tree.show(path));
        }
    }
    Ok(true)
}

fn text() -> Result<String> {
    Ok(serde_json::to_string_pretty(&interface())? + "\n")
}

fn interface() -> Value {
    let named = |errors: &[Error]| errors.iter().map(|error| format!("{error:?}")).collect::<Vec<_>>();
    let host_calls: Vec<Value> = CALLS
        .iter()
        .map(|call| {
            json!({
                "number": call.number, "name": call.name, "arguments": call.arguments, "results": call.results,
                "errors": named(refusals(call.name).unwrap_or_default()), "test_only": call.test_only,
            })
        })
        .collect();
    let errors: Vec<Value> = Error::ALL
        .iter()
        .map(|error| {
            let (name, meaning) = (format!("{error:?}"), error.to_string());
            json!({"name": name, "number": *error as u16, "word": error.to_word(), "meaning": meaning})
        })
        .collect();
    let exits: Vec<Value> = EXITS
        .iter()
        .enumerate()
        .map(|(reason, (name, data))| json!({"reason": reason, "name": name, "data": data}))
        .collect();
    let words: serde_json::Map<String, Value> = WORDS
        .iter()
        .map(|(word, values)| {
            let values: serde_json::Map<String, Value> =
                values.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
            ((*word).to_owned(), Value::Object(values))
        })
        .collect();
    json!({
        "deed": 1,
        "version": {"major": VERSION_MAJOR, "minor": VERSION_MINOR},
        "uid": DEED_UID,
        "convention": {
            "host_calls": "HVC #0, SMC64; x0 function, x1 to x6 arguments; result: x0 0 or NOT_SUPPORTED, x1 0 or a \
                           negated error, x2 to x9 results; with NoMemory x2 is the number of pages and x3 the pool",
            "guest_calls": "HVC #0; x0 function, x1 to x6 arguments; result: x0 to x3",
            "host_smcs": "SMC #0; x0 function, x1 to x3 arguments; result: x0",
            "exits": "results of VCPU_RUN: x2 reason, x3 to x9 data",
            "not_supported": abi::smccc::NOT_SUPPORTED,
            "invalid_parameter": abi::guest::INVALID_PARAMETER,
        },
        "host_calls": host_calls,
        "errors": errors,
        "exits": exits,
        "words": words,
        "guest_calls": functions(GUEST_CALLS),
        "guest_psci": functions(GUEST_PSCI),
        "host_smcs": functions(HOST_SMCS),
    })
}

fn functions(functions: &[Function]) -> Vec<Value> {
    functions
        .iter()
        .map(|call| {
            json!({
                "number": call.number, "name": call.name, "arguments": call.arguments, "results": call.results,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_file_is_the_interfaces() {
        let committed = include_str!("../../../docs/hypercalls.json");
        assert!(text().unwrap() == committed, "make it anew: cargo xtask abi --json docs/hypercalls.json");
    }

    #[test]
    fn every_call_is_there_and_integers_are_integers() {
        let interface = interface();
        let calls = interface["host_calls"].as_array().unwrap();
        assert_eq!(calls.len(), CALLS.len());
        assert!(calls.iter().all(|call| call["number"].is_u64() && call["errors"].is_array()));
        assert_eq!(interface["errors"][0]["word"], u64::MAX);
    }
}
