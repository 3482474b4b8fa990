//! What the documents say, held against the crates that they describe.

use abi::host::CALLS;

const HYPERCALLS: &str = include_str!("../../docs/hypercalls.md");

#[test]
fn the_table_of_host_calls_is_the_interfaces() {
    // The table does not write out a run of names.
    let data = (0..7).map(|n| format!("data{n}")).collect::<Vec<_>>().join(", ");
    let cell = |names: &[&str]| match names.join(", ").replace(&data, "data0 ... data6") {
        names if names.is_empty() => String::from(" "),
        names => format!(" {names} "),
    };
    let expected: Vec<String> = CALLS
        .iter()
        .map(|call| {
            let builds = if call.test_only { " (test builds)" } else { "" };
            let (arguments, results) = (cell(call.arguments), cell(call.results));
            format!("| {:08X} | {}{builds} |{arguments}|{results}|", call.number, call.name)
        })
        .collect();
    let (_, section) = HYPERCALLS.split_once("\n### The calls\n").unwrap();
    let (section, _) = section.split_once("\nWords:\n").unwrap();
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| C6")).collect();
    assert_eq!(rows, expected);
}
