//! What the oracle build says of itself: in the verdict line, how many transitions were checked and what that cost.
//! And that no other build has anything of it.

use crate::console::Console;
use crate::elf;
use crate::report::Check;
use anyhow::{Result, bail, ensure};

/// The feature of the hypervisor that has the oracle.
pub(crate) const FEATURE: &str = "oracle";

/// Checks that the oracle was there and did something, and, if the run has `counted` a nanosecond of the system counter
/// for each instruction, says what it cost.
pub(crate) fn check(console: &Console, counted: bool) -> Check {
    let words = console.facts("verdict ").unwrap_or_default();
    let number = |name: &str| words.get(name).and_then(|word| word.parse::<u64>().ok());
    let figures = [number("checked"), number("core_ns"), number("oracle_ns")];
    let (observed, pass) = match figures {
        [Some(checked @ 1..), ..] if !counted => (format!("{checked} transitions checked"), true),
        [Some(checked @ 1..), Some(core @ 1..), Some(oracle)] => (cost(checked, core, oracle), true),
        [Some(_), ..] => ("none were checked".to_owned(), false),
        _ => ("nothing of an oracle in the verdict".to_owned(), false),
    };
    Check::new("oracle", "transitions were checked", observed, pass)
}

/// Whether a failed check is the oracle's report, as the panic line begins it.
pub(crate) fn is_report(check: &Check) -> bool {
    const REPORTS: [&str; 2] =
        ["broken invariant: core and specification disagree over ", "broken invariant: before "];
    check.name == "panic" && REPORTS.iter().any(|report| check.observed.contains(report))
}

/// A text of the oracle's report, which stays in an image whatever is inlined.
const TEXT: &[u8] = b"core and specification disagree over";

/// Checks that an image has the oracle exactly if it should: its report, and code of the oracle or of the
/// specification.
pub(crate) fn check_image(elf: &[u8], wanted: bool) -> Result<()> {
    let has_text = elf.windows(TEXT.len()).any(|window| window == TEXT);
    let symbols = elf::symbols(elf)?;
    let symbol = symbols.keys().find(|name| is_of_oracle(name));
    match (wanted, has_text, symbol) {
        (false, _, Some(symbol)) => bail!("an image without the oracle has `{symbol}`"),
        (false, true, None) => bail!("an image without the oracle has its report"),
        (true, ..) => ensure!(has_text && symbol.is_some(), "the image with the oracle has no oracle"),
        (false, false, None) => {}
    }
    Ok(())
}

/// Whether a mangled symbol is of the crate `spec` or of a module `oracle`: a part of a path is its length and its
/// name.
fn is_of_oracle(symbol: &str) -> bool {
    ["4spec", "6oracle"].iter().any(|part| {
        let starts = symbol.match_indices(part).map(|(at, _)| at);
        starts.into_iter().any(|at| !symbol[..at].ends_with(|c: char| c.is_ascii_digit()))
    })
}

fn cost(checked: u64, core: u64, oracle: u64) -> String {
    let with = core + oracle;
    format!(
        "{checked} transitions checked; {core} instructions without the oracle, {with} with it: {} times as many",
        with / core
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(verdict: &str) -> Check {
        check(&Console::parse(&format!("[deed] verdict nonce=1 reason=off{verdict}\n")), true)
    }

    #[test]
    fn an_image_without_an_oracle_or_one_that_checked_nothing_fails() {
        assert!(!judge("").pass);
        assert!(!judge(" checked=0 core_ns=0 oracle_ns=0").pass);
        assert!(!check(&Console::parse(""), true).pass);
    }

    #[test]
    fn symbols_of_the_oracle_are_told_from_others() {
        for symbol in ["_ZN3hyp6oracle5check5Watch3end17h0123456789abcdefE", "_ZN4spec4step5Turn5serve17h0E"]
        {
            assert!(is_of_oracle(symbol), "{symbol}");
        }
        for symbol in
            ["_ZN3hyp9ownership5share3pin17h0E", "_ZN3hyp14special_things3pin17h0E", "__image_start"]
        {
            assert!(!is_of_oracle(symbol), "{symbol}");
        }
    }

    #[test]
    fn a_run_on_cpus_at_once_has_no_cost_to_tell() {
        let console = Console::parse("[deed] verdict nonce=1 reason=off checked=3 core_ns=0 oracle_ns=0\n");
        let check = check(&console, false);
        assert!(check.pass);
        assert_eq!(check.observed, "3 transitions checked");
    }

    #[test]
    fn the_cost_is_told_in_instructions() {
        let check = judge(" checked=3 core_ns=1000 oracle_ns=49000");
        assert!(check.pass);
        assert_eq!(
            check.observed,
            "3 transitions checked; 1000 instructions without the oracle, 50000 with it: 50 times as many"
        );
    }
}
