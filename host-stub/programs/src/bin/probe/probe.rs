//! The probe.

use abi::HostCall;
use abi::host::FailureKind;
use host_programs::deed::{Deed, Touch};
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

/// First page of QEMU's RAM.
const RAM_START: u64 = 0x4_0000;
/// fw_cfg, whose DMA would reach any address.
const FW_CFG: u64 = 0x0902_0000;
/// The SMMU, which would translate for devices as it is told.
const SMMU: u64 = 0x0905_0000;
/// The first registers of the GIC distributor: a device that is the host's and can be read without effect.
const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
const PAGE_SIZE: u64 = 4096;
/// Of the open pages, one in so many is touched.
const OPEN_STRIDE: u64 = 16;

#[derive(Debug, Default)]
struct Counts {
    ram: u64,
    accessible: u64,
    closed: u64,
    wrong: u64,
    aborts: u64,
    first_closed: u64,
    last_closed: u64,
}

pub(crate) fn main(arguments: &[&str], steps: &mut Steps) -> Result<(), Failure> {
    let deed = Deed::open()?;
    if arguments.contains(&"registers") {
        return crate::registers::read_all(&deed, steps);
    }
    if let [_, "break", kind, page] = arguments {
        return break_it(&deed, kind, page);
    }
    let pages = ram_pages(&deed)?;
    steps.tell(format_args!(
        "The host's kernel asks for all {pages} pages of RAM and touches every one that is closed to it."
    ));
    let counted = deed.injected_aborts()?;
    let taken = deed.stats()?.aborts;

    let mut counts = Counts::default();
    for pfn in RAM_START..RAM_START + pages {
        touch(&deed, pfn, &mut counts, steps)?;
    }
    steps.tell(format_args!(
        "  {} pages are open to the host, {} are not, from {:#x} to {:#x}.",
        counts.accessible,
        counts.closed,
        counts.first_closed * PAGE_SIZE,
        (counts.last_closed + 1) * PAGE_SIZE,
    ));
    steps.check("hypervisor-has-pages-of-its-own", "more than 0", counts.closed, counts.closed > 0);
    steps.check("host-has-pages", "more than 0", counts.accessible, counts.accessible > 0);
    steps.equal("every-page-behaves-as-the-hypervisor-says", 0, counts.wrong);

    let fw_cfg = device_aborts(&deed, FW_CFG)?;
    steps.equal("the-firmware-configuration-device-aborts", 2, fw_cfg);
    counts.aborts += fw_cfg;
    if arguments.contains(&"smmu") {
        let smmu = device_aborts(&deed, SMMU)?;
        steps.equal("the-smmu-aborts", 2, smmu);
        counts.aborts += smmu;
    }
    let device = deed.load(GIC_DISTRIBUTOR)?;
    steps.check("a-device-of-the-hosts-can-be-touched", "done", device, matches!(device, Touch::Done(_)));

    steps.equal("kernel-counts-the-aborts", counts.aborts, deed.stats()?.aborts - taken);
    match (counted, deed.injected_aborts()?) {
        (Some(before), Some(after)) => {
            steps.equal("hypervisor-counts-the-aborts", counts.aborts, after - before);
        }
        _ => steps.skip("hypervisor-counts-the-aborts", "this build of the hypervisor has no test calls"),
    }
    Ok(())
}

/// How many of a load and a store to a device's registers abort.
fn device_aborts(deed: &Deed, device: u64) -> Result<u64, Failure> {
    let touches = [(0, deed.load(device)?), (16, deed.store(device + 16, 0)?)];
    Ok(touches.iter().filter(|(offset, touch)| touch.is_injected_abort(*offset)).count() as u64)
}

/// Breaks the hypervisor, which must not come back from that. What there is to load from is a page, in hexadecimal.
fn break_it(deed: &Deed, kind: &str, page: &str) -> Result<(), Failure> {
    let kind = match kind {
        "invariant" => FailureKind::Invariant,
        "access" => FailureKind::Access,
        "stack" => FailureKind::Stack,
        other => return Err(failure!("there is no failure `{other}`")),
    };
    let pfn = u64::from_str_radix(page, 16).map_err(|_| failure!("`{page}` is no page"))?;
    let answer = deed.call(HostCall::TestFail { kind: kind as u64, pfn })?;
    Err(failure!("the hypervisor goes on: {answer}"))
}

/// Pages of RAM from its start: up to the last page that is RAM, or closed as the hypervisor's own memory is.
fn ram_pages(deed: &Deed) -> Result<u64, Failure> {
    let mut size = 1 << 14;
    while is_ram(deed, RAM_START + size)? {
        size += 1 << 10;
        if size > 1 << 24 {
            return Err(failure!("RAM has no end"));
        }
    }
    Ok(size)
}

fn is_ram(deed: &Deed, pfn: u64) -> Result<bool, Failure> {
    let [_, ram, ..] = deed.must(HostCall::QueryPage { pfn })?;
    Ok(ram != 0)
}

/// One page. Where the host must have no access: a load and a store. Where it has: a load of some pages, and of
/// every page behind a closed one.
fn touch(deed: &Deed, pfn: u64, counts: &mut Counts, steps: &mut Steps) -> Result<(), Failure> {
    let open = deed.accessible(pfn)?;
    let at = pfn * PAGE_SIZE + 8;
    counts.ram += 1;
    let right = if open {
        counts.accessible += 1;
        let border = counts.last_closed + 1 == pfn;
        !(border || pfn.is_multiple_of(OPEN_STRIDE)) || matches!(deed.load(at)?, Touch::Done(_))
    } else {
        counts.closed += 1;
        counts.first_closed = if counts.closed == 1 { pfn } else { counts.first_closed };
        counts.last_closed = pfn;
        let touches = [deed.load(at)?, deed.store(at, 0)?];
        let aborts = touches.iter().filter(|touch| touch.is_injected_abort(at)).count();
        counts.aborts += aborts as u64;
        aborts == touches.len()
    };
    if !right {
        counts.wrong += 1;
        if counts.wrong <= 4 {
            steps.tell(format_args!("  page {pfn:#x} should be {}", if open { "open" } else { "closed" }));
        }
    }
    Ok(())
}
