//! Device trees from a boot loader. The input is the first 64 bytes of the kernel, then the tree.
//!
//! A tree that makes no sense is an error with a reason. One that is accepted keeps what the plan promises: parts lie in
//! RAM and share no byte, the kernel's header is read only where there is RAM, and the host's tree is one that can be
//! read again, with the same RAM, Deed's memory reserved, and no boot module left. `dtoolkit` had no part in writing
//! either: what it could read before it can read after.

use crate::Outcomes;
use crate::input::Input;
use hyp::boot::blob::{Source, Token};
use hyp::boot::edit::{self, EditError};
use hyp::boot::plan::Part;
use hyp::boot::tree::{self, Facts, TreeError};
use hyp::boot::{Plan, Problem, Region, plan};
use std::collections::HashSet;
use std::mem::discriminant;

/// Where the tree lies.
const TREE: u64 = 0x4800_0000;
/// The hypervisor's image.
const DEED: (u64, u64) = (0x4020_0000, 0x10_0000);

fn region((start, size): (u64, u64)) -> Region {
    Region::new(start, size).expect("a run of bytes")
}

/// Plays one input.
///
/// # Panics
/// If a promise is broken.
pub fn run(data: &[u8], outcomes: &mut Outcomes) {
    let mut input = Input::new(data);
    let header = input.bytes::<64>();
    let blob = input.rest();
    let facts = tree::read(blob);
    note_facts(&facts, outcomes);
    let Some(place) = Region::new(TREE, blob.len() as u64) else { return };
    let mut was_read = None;
    let planned = plan(blob, place, region(DEED), |at| {
        was_read = Some(at);
        Some(header)
    });
    if let Some(at) = was_read {
        let facts = facts.as_ref().expect("a kernel in a tree that cannot be read");
        assert!(facts.ram.iter().any(|ram| ram.start() <= at && at < ram.end()), "{at:#x} is no RAM");
    }
    match planned {
        Ok(plan) => {
            check_plan(&plan, place);
            let image_size = u64::from_le_bytes(*header[16..].first_chunk().expect("8 bytes of the header"));
            assert!(image_size <= plan.host.size(), "the kernel has less memory than it asks for");
            host_tree(&plan, blob, outcomes);
        }
        Err(problem) => note_problem(problem, outcomes),
    }
}

fn note_facts(facts: &Result<Facts<'_>, TreeError>, outcomes: &mut Outcomes) {
    match facts {
        Ok(facts) => {
            let many = |count: usize| count.min(2);
            outcomes.note(("ram", many(facts.ram.len()), "reserved", many(facts.reserved.len())));
            outcomes.note(("dropped", many(facts.dropped.len()), "withheld", many(facts.withheld.len())));
            outcomes.note((
                "modules",
                facts.modules.iter().map(|module| discriminant(&module.kind)).collect::<Vec<_>>(),
            ));
            outcomes.note((facts.drops_smmu, facts.arguments.is_empty()));
        }
        Err(TreeError::TooMany(what) | TreeError::BadReg(what) | TreeError::BadText(what)) => {
            outcomes.note(("tree", what, discriminant(facts.as_ref().unwrap_err())));
        }
        Err(error) => outcomes.note(("tree", discriminant(error))),
    }
}

fn note_problem(problem: Problem, outcomes: &mut Outcomes) {
    outcomes.note(("problem", discriminant(&problem)));
    match problem {
        Problem::Twice(part) | Problem::OutsideRam(part, _) => {
            outcomes.note((discriminant(&problem), discriminant(&part)))
        }
        Problem::Overlap(a, _, b, _) => outcomes.note((discriminant(&a), discriminant(&b))),
        Problem::Host(error) => outcomes.note(discriminant(&error)),
        _ => {}
    }
    // A reason can be told.
    assert!(!problem.to_string().is_empty());
}

fn check_plan(plan: &Plan<'_>, tree: Region) {
    let facts = &plan.facts;
    let parts: Vec<(Part, Region)> =
        [(Part::Deed, plan.deed), (Part::DeviceTree, tree), (Part::Host, plan.host)]
            .into_iter()
            .chain(plan.ramdisk.map(|ramdisk| (Part::Ramdisk, ramdisk)))
            .collect();
    let bytes = |region: Region| region.start()..region.end();
    let meet = |a: Region, b: Region| bytes(a).start < bytes(b).end && bytes(b).start < bytes(a).end;
    for (number, (part, at)) in parts.iter().enumerate() {
        let inside = |ram: &Region| ram.start() <= at.start() && at.end() <= ram.end();
        assert!(facts.ram.iter().any(inside), "{part} at {at} is not in RAM");
        for (other, with) in &parts[number + 1..] {
            assert!(!meet(*at, *with), "{part} at {at} meets {other} at {with}");
        }
        for reserved in facts.reserved.iter().filter(|reserved| reserved.no_map) {
            assert!(!meet(*at, reserved.region), "{part} at {at} is reserved");
        }
    }
    for (number, a) in facts.ram.iter().enumerate() {
        assert!(facts.ram[number + 1..].iter().all(|b| !meet(*a, *b)), "RAM overlaps");
    }
    for pages in &plan.ram {
        let region = Region::of_pages(*pages);
        assert!(facts.ram.iter().any(|ram| ram.covers(region)), "{region} is no RAM");
    }
    for reserved in facts.reserved.iter().filter(|reserved| reserved.no_map) {
        let covered = |at: u64| {
            plan.no_map.iter().any(|pages| pages.start().base().as_u64() <= at && at >> 12 < pages.end())
        };
        assert!(
            covered(reserved.region.start()) && covered(reserved.region.end() - 1),
            "no-map memory is given away"
        );
    }
    assert!(facts.withheld.is_empty() == plan.withheld.is_empty());
}

/// The names of the nodes below the root.
fn names_below_root(blob: &[u8]) -> Option<Vec<&[u8]>> {
    let mut tokens = Source::new(blob)?.tokens();
    let mut names = Vec::new();
    let mut depth = 0;
    loop {
        match tokens.next()? {
            Token::Begin(name) => {
                if depth == 1 {
                    names.push(name);
                }
                depth += 1;
            }
            Token::End => depth -= 1,
            Token::Property { .. } => {}
            Token::Finish => return Some(names),
        }
    }
}

/// Writes the host's tree, into room that is enough and into room that is not.
fn host_tree(plan: &Plan<'_>, blob: &[u8], outcomes: &mut Outcomes) {
    const UNTOUCHED: u8 = 0xa5;
    let mut scratch = vec![UNTOUCHED; blob.len() + 0x400];
    let length = match edit::write(plan, blob, &mut scratch) {
        Ok(length) => length,
        Err(problem) => {
            outcomes.note(("tree not written", discriminant(&problem)));
            assert_eq!(problem, EditError::NoRoom, "a tree that was read cannot be written");
            return;
        }
    };
    outcomes.note("tree written");
    // Where two devices have one name, which no tree may have, both go: the rest is not promised.
    let is_named_twice =
        names_below_root(blob).is_none_or(|names| names.iter().collect::<HashSet<_>>().len() < names.len());
    assert!(
        scratch[length..].iter().all(|byte| *byte == UNTOUCHED),
        "more was written than the tree's length"
    );
    let mut small = vec![UNTOUCHED; length - 1];
    assert_eq!(edit::write(plan, blob, &mut small), Err(EditError::NoRoom));

    if is_named_twice {
        return outcomes.note("named twice");
    }
    let written = &scratch[..length];
    let facts = match tree::read(written) {
        Ok(facts) => facts,
        // One reservation more than Deed itself can read is none too many for a host.
        Err(TreeError::TooMany("reservations")) => return outcomes.note("full"),
        Err(error) => panic!("the host's tree cannot be read: {error:?}"),
    };
    assert_eq!(facts.ram, plan.facts.ram, "the host's RAM is another");
    assert!(facts.modules.is_empty() && facts.withheld.is_empty(), "what is Deed's is in the host's tree");
    assert_eq!(facts.arguments, plan.arguments.unwrap_or(""));
    let own = facts.reserved.iter().any(|reserved| reserved.no_map && reserved.region.covers(plan.deed));
    assert!(own, "Deed's memory is not reserved");
    let source = Source::new(blob).expect("a tree that was read");
    let host = Source::new(written).expect("a tree that was read");
    assert!(source.reservations().eq(host.reservations()), "memory reservations have changed");

    let before = dtoolkit::fdt::Fdt::new(blob);
    let after = dtoolkit::fdt::Fdt::new(written);
    outcomes.note(("another parser", before.is_ok(), after.is_ok()));
    assert!(before.is_err() || after.is_ok(), "the host's tree is none to another parser: {:?}", after.err());
}
