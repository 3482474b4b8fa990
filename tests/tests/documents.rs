//! What the documents say, held against the crates that they describe.

use abi::Error;
use abi::host::CALLS;
use abi::tables::{EXITS, Function, GUEST_CALLS, GUEST_PSCI, HOST_SMCS, refusals};
use std::collections::BTreeSet;

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

/// The cells of the rows of the tables in a section.
fn rows(from: &str, to: &str) -> Vec<Vec<&'static str>> {
    let (_, section) = HYPERCALLS.split_once(from).expect("the section begins");
    let (section, _) = section.split_once(to).expect("the section ends");
    let lines = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("|---"));
    lines.map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect()).collect()
}

#[test]
fn the_table_of_refusals_is_the_interfaces() {
    let table = rows("\nPages of each call, and errors.", "\n*Claim*");
    let text = |name: &str| {
        let row = table.iter().find(|row| row[0].split(", ").any(|call| call == name));
        row.map_or("", |row| row[2])
    };
    let named = |text: &str| -> BTreeSet<u16> {
        let is_named = |error: &Error| text.contains(&format!("`{error:?}`"));
        Error::ALL.into_iter().filter(is_named).map(|error| error as u16).collect()
    };
    let set = |errors: &[Error]| errors.iter().map(|error| *error as u16).collect::<BTreeSet<u16>>();
    for call in CALLS {
        let row = text(call.name);
        let mut expected = named(row);
        for other in CALLS.iter().filter(|other| row.contains(&format!("as {}", other.name))) {
            expected.extend(named(text(other.name)));
        }
        if call.arguments.contains(&"pages") {
            expected.extend(set(&[Error::Invalid, Error::Permission]));
        }
        if call.arguments.contains(&"gfn") {
            expected.extend(set(&[Error::Range]));
        }
        if call.arguments.contains(&"vm") {
            expected.extend(set(&[Error::NoEntry]));
        }
        if row.contains("*claim*") {
            expected.extend(set(&[Error::NoEntry, Error::Permission, Error::Busy]));
        }
        assert_eq!(set(refusals(call.name).expect("a row")), expected, "{}", call.name);
    }
}

#[test]
fn the_specification_refuses_as_the_interface_says() {
    // A vCPU that runs, of which the rules know nothing, and a page that is lent 63 times, for which the worlds are
    // too small.
    const BEYOND: [&str; 3] = ["UNSHARE_ACK", "VM_TEARDOWN_START", "SHARE_GUEST"];
    for (call, listed) in spec::call::CALLS.iter().zip(spec::worlds::LISTED) {
        let Some(documented) = refusals(call) else { continue };
        let beyond = |error: &&Error| BEYOND.contains(call) && **error == Error::Busy;
        assert_eq!(BEYOND.contains(call), documented.iter().any(|error| beyond(&error)), "{call}");
        let within = documented.iter().filter(|error| !beyond(error));
        let documented: BTreeSet<String> = within.map(|error| format!("{error:?}")).collect();
        let error_of = |outcome: &&str| {
            let name = outcome.split(':').next()?;
            Error::ALL.iter().map(|error| format!("{error:?}")).find(|error| error == name)
        };
        assert_eq!(listed.iter().filter_map(error_of).collect::<BTreeSet<_>>(), documented, "{call}");
    }
}

#[test]
fn the_tables_of_guest_calls_and_exits_are_the_interfaces() {
    let listed = |functions: &[Function]| -> BTreeSet<(String, String)> {
        functions.iter().map(|call| (format!("{:08X}", call.number), call.name.to_owned())).collect()
    };
    // A row may have several functions; a name may have its arguments behind it.
    let of = |rows: Vec<Vec<&str>>| -> BTreeSet<(String, String)> {
        rows.iter()
            .filter(|row| row[0].starts_with(['8', 'C']))
            .flat_map(|row| {
                let name = row[1].split(" (").next().unwrap_or_default();
                row[0].split(", ").zip(name.split(", ")).map(|(n, name)| (n.to_owned(), name.to_owned()))
            })
            .collect()
    };
    assert_eq!(of(rows("\n## Guest calls\n", "\n*Range*: x1")), listed(GUEST_CALLS));
    assert_eq!(of(rows("\n### PSCI for guests\n", "\n## SMCs")), listed(GUEST_PSCI));
    let smcs: BTreeSet<&str> = rows("\n## SMCs of the host\n", "\n## Where")
        .iter()
        .skip(1)
        .flat_map(|row| row[0].split(", "))
        .collect();
    assert_eq!(smcs, HOST_SMCS.iter().map(|smc| smc.name).collect());
    let exits: Vec<String> = rows("\n### Exits\n", "\n### Unshare")
        .iter()
        .skip(1)
        .map(|row| format!("{} {}", row[0], row[1]))
        .collect();
    let expected = EXITS.iter().enumerate().map(|(reason, (name, _))| format!("{reason} `{name}`"));
    assert_eq!(exits, expected.collect::<Vec<_>>());
}

#[test]
fn no_host_call_takes_an_address_in_the_hypervisor_or_the_host() {
    // Page numbers, counts, names and values. `pc` and `x0` are a guest's registers, `from` is the number of an
    // event, `kind` that of a way to break.
    const KNOWN: [&str; 15] = [
        "pool",
        "pfn",
        "pages",
        "vm",
        "gfn",
        "permissions",
        "flags",
        "root",
        "vcpu",
        "pc",
        "x0",
        "register",
        "value",
        "from",
        "kind",
    ];
    for call in CALLS {
        for argument in call.arguments {
            let name = argument.trim_end_matches(|digit: char| digit.is_ascii_digit() && *argument != "x0");
            assert!(KNOWN.contains(&name), "{}: {argument}", call.name);
        }
    }
}

#[test]
fn every_known_defect_that_applies_has_a_test_that_exists() {
    const DEFECTS: &str = include_str!("../../docs/known-defects.md");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let exists = |test: &str| {
        let (file, name) = test.split_once("::").unwrap_or((test, ""));
        let text = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        match name {
            "" => !text.is_empty(),
            // Some tests are made by a macro, out of a name and a word.
            _ if file.ends_with(".rs") => {
                text.contains(&format!("#[test]\n    fn {name}()"))
                    || text.contains(&format!("#[test]\nfn {name}()"))
                    || text.contains(&format!("\n    {name}: \""))
            }
            _ => text.contains(&format!("\n    \"{name}\",")),
        }
    };
    let rows = DEFECTS.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| behaviour"));
    let mut count = 0;
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let &[behaviour, applies, tests] = &cells[..] else { panic!("three cells: {row}") };
        let named: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        for test in &named {
            assert!(exists(test), "{behaviour}: there is no {test}");
        }
        let does_not_apply = applies.starts_with("no: ") && tests == "-";
        assert!(does_not_apply || !named.is_empty() || tests.starts_with("nothing: "), "{behaviour}");
        assert!(["yes", "in part: ", "no: ", "unknown"].iter().any(|word| applies.starts_with(word)));
        count += 1;
    }
    println!("{count} known defects");
    assert!(count > 80, "the tables are read");
}
