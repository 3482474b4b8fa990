//! Registers of features that nobody has, as the host's kernel finds them.

use host_programs::Failure;
use host_programs::deed::Deed;
use host_programs::steps::{Steps, format};

/// Numbers of ID_AA64PFR0_EL1 and ID_AA64PFR1_EL1.
const PFR0: u64 = 0;
const PFR1: u64 = 1;
/// ESR of an instruction that does not exist: class 0, 32 bits, nothing else.
const ESR_UNDEFINED: u64 = 1 << 25;
/// What must not be there, by its number.
const UNDEFINED: [(&str, u64); 8] = [
    ("gcr-el1", 2),
    ("rgsr-el1", 3),
    ("tfsr-el1", 4),
    ("tfsre0-el1", 5),
    ("gmid-el1", 6),
    ("zcr-el1", 7),
    ("smcr-el1", 8),
    ("svcr", 9),
];

pub(crate) fn read_all(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("The host's kernel asks for features that the hypervisor hides, and reads their registers.");
    for (name, register, shift) in [("sve", PFR0, 32), ("mte", PFR1, 8), ("sme", PFR1, 24)] {
        let field = deed.hidden(register)?.map(|value| value >> shift & 0xf);
        let step = format(format_args!("the-host-is-told-of-no-{name}"));
        steps.check(&step, "0", format(format_args!("{field:x?}")), field == Ok(0));
    }
    for (name, register) in UNDEFINED {
        let step = format(format_args!("{name}-is-undefined-for-the-host"));
        let found = deed.hidden(register)?;
        let expected = Err(ESR_UNDEFINED);
        let show = |what: Result<u64, u64>| format(format_args!("{what:x?}"));
        steps.check(&step, show(expected), show(found), found == expected);
    }
    Ok(())
}
