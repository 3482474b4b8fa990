//! Calls of the host in words, for the stories that failures tell.

use abi::VmHandle;
use abi::host::{CALLS, CallInfo, HostCall};
use hyp::testing::{RAM_PAGES, RAM_START};

/// What the interface says of a call.
///
/// # Panics
/// If the call is not listed.
pub fn info_of(call: HostCall) -> &'static CallInfo {
    let [number, ..] = call.encode();
    CALLS.iter().find(|info| u64::from(info.number) == number).expect("a call that is listed")
}

/// Tells a call with its arguments, pages of RAM by their numbers there.
///
/// # Panics
/// If the call is not listed.
pub fn host_call(call: HostCall) -> String {
    let [_, arguments @ ..] = call.encode();
    let info = info_of(call);
    let told = info.arguments.iter().zip(arguments).map(|(name, word)| argument(name, word));
    format!("{}: {}", info.name, told.collect::<Vec<_>>().join(", "))
}

fn argument(name: &str, word: u64) -> String {
    match name {
        "pfn" | "root" => match word.checked_sub(RAM_START) {
            Some(page) if page < RAM_PAGES => {
                format!("{}page {page:#x} of RAM", if name == "pfn" { "" } else { "root at " })
            }
            _ => format!("page {word:#x}, no RAM"),
        },
        "gfn" => format!("guest page {word:#x}"),
        "pages" if word == 1 => "1 page".to_owned(),
        "pages" => format!("{word} pages"),
        "vm" => VmHandle::from_word(word).map_or_else(|| format!("no VM {word:#x}"), |vm| format!("{vm:?}")),
        name => format!("{name} {word:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_told_with_its_pages() {
        let vm = VmHandle::new(3, 2).unwrap();
        let donate = HostCall::DonateGuest { vm, pfn: RAM_START + 0x200, gfn: 0x1ff, pages: 2 };
        assert_eq!(host_call(donate), "DONATE_GUEST: vm3.2, page 0x200 of RAM, guest page 0x1ff, 2 pages");
        let share = HostCall::ShareHyp { pfn: RAM_START + RAM_PAGES, pages: 1 };
        assert_eq!(host_call(share), format!("SHARE_HYP: page {:#x}, no RAM, 1 page", RAM_START + RAM_PAGES));
    }
}
