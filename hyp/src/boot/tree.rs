//! What Deed reads from the device tree: memory, reservations, boot modules, and the nodes that the host must
//! not see as they are.

use super::region::Region;
use arrayvec::ArrayVec;
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{FdtStringListIterator, Node, Property};

/// Runs of RAM that Deed can hold.
pub const MAX_RAM: usize = 16;
/// Reservations that Deed can hold.
pub const MAX_RESERVED: usize = 16;
/// Device register ranges that can be withheld from the host.
pub const MAX_WITHHELD: usize = 8;
/// Boot modules that can be looked at.
pub const MAX_MODULES: usize = 8;
/// Nodes below the root that can be left out of the host's tree.
pub const MAX_DROPPED: usize = 8;

/// Why a device tree cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeError {
    /// It is no device tree, or damaged.
    Malformed,
    /// More of this than Deed can hold.
    TooMany(&'static str),
    /// A `reg` of this cannot be read, is empty or leaves the address space.
    BadReg(&'static str),
    /// A text property of this is no text.
    BadText(&'static str),
    /// No memory node.
    NoMemory,
    /// The timer node, or the interrupt controller that it names, cannot be understood.
    BadTimer,
}

/// A boot module.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// Name of its node below `/chosen`.
    pub name: &'a str,
    /// Its bytes.
    pub region: Region,
    /// What it is.
    pub kind: ModuleKind,
    /// Its `bootargs`.
    pub arguments: Option<&'a str>,
}

/// What a boot module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// The host: `multiboot,kernel`.
    Kernel,
    /// The host's initial ramdisk: `multiboot,ramdisk`.
    Ramdisk,
    /// Something that Deed does not know.
    Unknown,
}

/// Memory that must stay as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Its bytes.
    pub region: Region,
    /// The host must not map it: it belongs to firmware or to a device.
    pub no_map: bool,
}

/// The timer node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timer<'a> {
    /// Its name.
    pub name: &'a str,
    /// The interrupt of EL1's physical timer, as the node has it.
    pub physical: &'a [u8],
}

/// What a device tree says, as far as Deed wants to know.
#[derive(Clone, Debug, Default)]
pub struct Facts<'a> {
    /// All RAM.
    pub ram: ArrayVec<Region, MAX_RAM>,
    /// `/memreserve/` and `/reserved-memory`.
    pub reserved: ArrayVec<Reservation, MAX_RESERVED>,
    /// Boot modules.
    pub modules: ArrayVec<Module<'a>, MAX_MODULES>,
    /// Deed's own command line.
    pub arguments: &'a str,
    /// Nodes below the root that the host must not see: fw_cfg and SMMUs, which let it write any memory.
    pub dropped: ArrayVec<&'a str, MAX_DROPPED>,
    /// Their registers.
    pub withheld: ArrayVec<Region, MAX_WITHHELD>,
    /// An SMMU is among them, so nodes must not refer to it.
    pub drops_smmu: bool,
    /// The timer.
    pub timer: Timer<'a>,
}

/// What a node below the root is to Deed, by its `compatible`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Device {
    Timer,
    FwCfg,
    Smmu,
}

const COMPATIBLE: [(&str, Device); 6] = [
    ("arm,armv8-timer", Device::Timer),
    ("qemu,fw-cfg-mmio", Device::FwCfg),
    ("arm,smmu-v3", Device::Smmu),
    ("arm,mmu-500", Device::Smmu),
    ("arm,smmu-v2", Device::Smmu),
    ("arm,smmu-v1", Device::Smmu),
];

/// Reads a device tree.
///
/// # Errors
/// See [`TreeError`].
pub fn read(blob: &[u8]) -> Result<Facts<'_>, TreeError> {
    let fdt = Fdt::new(blob).map_err(|_| TreeError::Malformed)?;
    let root = fdt.root();
    let mut facts = Facts::default();
    for reservation in fdt.memory_reservations() {
        let region = Region::new(reservation.address(), reservation.size());
        let region = region.ok_or(TreeError::BadReg("memreserve"))?;
        push(&mut facts.reserved, Reservation { region, no_map: false }, "reservations")?;
    }
    for node in root.children() {
        match node.name_without_address() {
            "chosen" => read_chosen(&mut facts, node)?,
            "reserved-memory" => read_reserved(&mut facts, node)?,
            "memory" => read_memory(&mut facts, node)?,
            _ => read_device(&mut facts, root, node)?,
        }
    }
    if facts.timer.physical.is_empty() {
        return Err(TreeError::BadTimer);
    }
    if facts.ram.is_empty() { Err(TreeError::NoMemory) } else { Ok(facts) }
}

fn read_memory(facts: &mut Facts<'_>, node: FdtNode<'_>) -> Result<(), TreeError> {
    for_each_region(node, "memory", |region| push(&mut facts.ram, region, "runs of RAM"))
}

fn read_reserved(facts: &mut Facts<'_>, node: FdtNode<'_>) -> Result<(), TreeError> {
    for child in node.children() {
        // A node without `reg` asks the kernel to find a place: nothing is reserved yet.
        if child.property("reg").is_none() {
            continue;
        }
        let no_map = child.property("no-map").is_some();
        for_each_region(child, "reserved-memory", |region| {
            push(&mut facts.reserved, Reservation { region, no_map }, "reservations")
        })?;
    }
    Ok(())
}

fn read_chosen<'a>(facts: &mut Facts<'a>, node: FdtNode<'a>) -> Result<(), TreeError> {
    facts.arguments = text(node, "bootargs", "chosen")?.unwrap_or("");
    for child in node.children() {
        let mut kind = None;
        for name in compatible(child) {
            kind = match name {
                "multiboot,kernel" => Some(ModuleKind::Kernel),
                "multiboot,ramdisk" => Some(ModuleKind::Ramdisk),
                "multiboot,module" => kind.or(Some(ModuleKind::Unknown)),
                _ => kind,
            };
        }
        let Some(kind) = kind else { continue };
        let module = Module {
            name: child.name(),
            region: module_region(child)?,
            kind,
            arguments: text(child, "bootargs", "boot module")?,
        };
        push(&mut facts.modules, module, "boot modules")?;
    }
    Ok(())
}

/// Where a boot module lies. QEMU's guest-loader writes two 64-bit values, whatever the cells of `/chosen`.
fn module_region(node: FdtNode<'_>) -> Result<Region, TreeError> {
    let bad = TreeError::BadReg("boot module");
    let reg = bytes(node, "reg").ok_or(bad)?;
    if let Some((start, size)) = reg.split_first_chunk()
        && let Ok(size) = size.try_into()
    {
        return Region::new(u64::from_be_bytes(*start), u64::from_be_bytes(size)).ok_or(bad);
    }
    let mut region = None;
    for_each_region(node, "boot module", |found| {
        region = Some(found);
        Ok(())
    })?;
    region.ok_or(bad)
}

fn read_device<'a>(facts: &mut Facts<'a>, root: FdtNode<'a>, node: FdtNode<'a>) -> Result<(), TreeError> {
    let known = compatible(node).find_map(|name| COMPATIBLE.iter().find(|(known, _)| *known == name));
    let Some((_, device)) = known else { return Ok(()) };
    if *device == Device::Timer {
        facts.timer = Timer { name: node.name(), physical: physical_timer_interrupt(root, node)? };
        return Ok(());
    }
    facts.drops_smmu |= *device == Device::Smmu;
    push(&mut facts.dropped, node.name(), "devices to withhold")?;
    for_each_region(node, "device to withhold", |region| push(&mut facts.withheld, region, "ranges to withhold"))
}

/// The interrupt of EL1's physical timer: the one named "phys", or else the second (Linux
/// `Documentation/devicetree/bindings/timer/arm,arch_timer.yaml`).
fn physical_timer_interrupt<'a>(root: FdtNode<'a>, timer: FdtNode<'a>) -> Result<&'a [u8], TreeError> {
    const PHYSICAL: usize = 1;
    const CELL: usize = 4;
    let interrupts: &[u8] = bytes(timer, "interrupts").ok_or(TreeError::BadTimer)?;
    let index = match bytes(timer, "interrupt-names") {
        Some(names) => names.split(|byte| *byte == 0).position(|name| name == b"phys"),
        None => Some(PHYSICAL),
    };
    let parent = number(timer, "interrupt-parent").or_else(|| number(root, "interrupt-parent"));
    let cells = parent.and_then(|parent| interrupt_cells(root, parent)).ok_or(TreeError::BadTimer)?;
    let size = usize::try_from(cells).ok().and_then(|cells| cells.checked_mul(CELL));
    let size = size.filter(|size| *size != 0).ok_or(TreeError::BadTimer)?;
    index.and_then(|index| interrupts.chunks_exact(size).nth(index)).ok_or(TreeError::BadTimer)
}

/// `#interrupt-cells` of the controller with this phandle, below the root.
fn interrupt_cells(root: FdtNode<'_>, phandle: u32) -> Option<u32> {
    let controller = root.children().find(|node| number(*node, "phandle") == Some(phandle))?;
    number(controller, "#interrupt-cells")
}

fn compatible<'a>(node: FdtNode<'a>) -> impl Iterator<Item = &'a str> {
    let list = node.property("compatible").and_then(|list| list.value_as::<FdtStringListIterator<'a>>().ok());
    list.into_iter().flatten()
}

fn bytes<'a>(node: FdtNode<'a>, property: &str) -> Option<&'a [u8]> {
    node.property(property)?.value_as::<&'a [u8]>().ok()
}

fn number(node: FdtNode<'_>, property: &str) -> Option<u32> {
    node.property(property)?.value_as::<u32>().ok()
}

fn text<'a>(node: FdtNode<'a>, property: &str, of: &'static str) -> Result<Option<&'a str>, TreeError> {
    let Some(property) = node.property(property) else { return Ok(None) };
    property.value_as::<&'a str>().map(Some).map_err(|_| TreeError::BadText(of))
}

/// Calls `each` for every run of bytes in a node's `reg`; one of size 0 is no run.
fn for_each_region(
    node: FdtNode<'_>,
    of: &'static str,
    mut each: impl FnMut(Region) -> Result<(), TreeError>,
) -> Result<(), TreeError> {
    let bad = TreeError::BadReg(of);
    let runs = node.reg().map_err(|_| bad)?.ok_or(bad)?;
    for run in runs {
        let (start, size) = (run.address::<u64>().map_err(|_| bad)?, run.size::<u64>().map_err(|_| bad)?);
        if size != 0 {
            each(Region::new(start, size).ok_or(bad)?)?;
        }
    }
    Ok(())
}

fn push<T, const N: usize>(list: &mut ArrayVec<T, N>, item: T, of: &'static str) -> Result<(), TreeError> {
    list.try_push(item).map_err(|_| TreeError::TooMany(of))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Builder, PHYSICAL_TIMER, Sample};
    use super::*;

    #[test]
    fn the_facts_of_a_machine_are_read() {
        let sample = Sample { smmu: true, reserved: vec![((0x5000_0000, 0x1000), true)], ..Sample::default() };
        let blob = sample.blob();
        let facts = read(&blob).unwrap();
        assert_eq!(facts.ram[..], [Region::new(0x4000_0000, 0x4000_0000).unwrap()]);
        assert_eq!(facts.dropped[..], ["fw-cfg@9020000", "smmuv3@9050000"]);
        assert_eq!(facts.timer, Timer { name: "timer", physical: &PHYSICAL_TIMER });
        assert_eq!(facts.reserved.len(), 1);
        assert!(facts.reserved[0].no_map && facts.drops_smmu);
        let kinds: Vec<_> = facts.modules.iter().map(|module| module.kind).collect();
        assert_eq!(kinds, [ModuleKind::Ramdisk, ModuleKind::Kernel]);
        assert_eq!(facts.arguments, "deed.nonce=00c0ffee");
    }

    #[test]
    fn memory_with_one_cell_is_read_as_its_parent_says() {
        let mut b = Builder::default();
        b.begin("").cells("#address-cells", &[1]).cells("#size-cells", &[1]).cells("interrupt-parent", &[1]);
        b.begin("memory@40000000").cells("reg", &[0x4000_0000, 0x1000_0000, 0x6000_0000, 0x1000]).end();
        b.begin("intc").cells("phandle", &[1]).cells("#interrupt-cells", &[3]).end();
        b.begin("timer").text("compatible", "arm,armv8-timer").cells("interrupts", &[1, 13, 4, 1, 14, 4]).end();
        b.end();
        let blob = b.finish(0);
        let runs = [Region::new(0x4000_0000, 0x1000_0000).unwrap(), Region::new(0x6000_0000, 0x1000).unwrap()];
        assert_eq!(read(&blob).unwrap().ram[..], runs);
    }

    #[test]
    fn a_timer_without_the_physical_interrupt_is_refused() {
        let names = |names| Sample { timer_names: Some(names), ..Sample::default() }.blob();
        assert_eq!(read(&names("virt\0hyp")).unwrap_err(), TreeError::BadTimer);
        assert_eq!(read(&names("a\0b\0c\0d\0phys")).unwrap_err(), TreeError::BadTimer);
        assert!(read(&names("virt\0phys")).is_ok());
    }

    #[test]
    fn more_than_deed_can_hold_is_refused_by_name() {
        let ram = (0..MAX_RAM as u64 + 1).map(|n| (n << 32, 0x1000)).collect();
        assert_eq!(read(&Sample { ram, ..Sample::default() }.blob()).unwrap_err(), TreeError::TooMany("runs of RAM"));
        let reservations = vec![(0x1000, 0x1000); MAX_RESERVED + 1];
        let blob = Sample { reservations, ..Sample::default() }.blob();
        assert_eq!(read(&blob).unwrap_err(), TreeError::TooMany("reservations"));
        let modules = vec![("multiboot,kernel", (0x1000, 0x1000), None); MAX_MODULES + 1];
        let blob = Sample { modules, ..Sample::default() }.blob();
        assert_eq!(read(&blob).unwrap_err(), TreeError::TooMany("boot modules"));
    }

    #[test]
    fn a_module_of_no_size_or_beyond_the_address_space_is_refused() {
        for at in [(0x4200_0000, 0), (1 << 48, 0x1000), (u64::MAX, 1)] {
            let modules = vec![("multiboot,kernel", at, None)];
            let blob = Sample { modules, ..Sample::default() }.blob();
            assert_eq!(read(&blob).unwrap_err(), TreeError::BadReg("boot module"));
        }
    }

    #[test]
    fn a_tree_without_memory_or_of_no_tree_at_all_is_refused() {
        assert_eq!(read(&Sample { ram: vec![], ..Sample::default() }.blob()).unwrap_err(), TreeError::NoMemory);
        assert_eq!(read(&[]).unwrap_err(), TreeError::Malformed);
        assert_eq!(read(&[0; 64]).unwrap_err(), TreeError::Malformed);
    }
}
