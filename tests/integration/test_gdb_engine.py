"""The gdb engine: the tests of the ptrace engine once more, by gdb on this machine and by way of a gdbserver.

Those in which an engine of its own may go wrong. What they do many times is done a few times here: gdb takes its time.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dynacut.live.process import Process
from dynacut.shared.region import find_region

from . import test_kill
from .conftest import Dynacut, Rounds
from .gdbserver import GdbDynacut, GdbServer
from .servers import Redis
from .test_actions import (  # noqa: F401 - collected here as well, with other fixtures
    test_a_plain_edit_flips_a_jump_and_back,
    test_a_plan_with_build_id_and_old_bytes_fits_the_program_it_was_made_for,
    test_learn_puts_the_bytes_back_and_tells_what_was_hit,
    test_redirect_within_a_function_uses_its_own_error_path,
    test_terminate_with_a_code_ends_the_process_with_that_status,
    test_the_json_is_as_designed,
)
from .test_handler_library import (  # noqa: F401
    returning,
    test_the_action_handler_needs_a_library,
)
from .test_live_http import (  # noqa: F401
    test_nginx_refuses_uploads_in_all_processes_and_takes_them_again,
)
from .test_live_redis import (
    SET_TO_ERROR,
    test_a_thousand_times_off_and_on_under_load,  # noqa: F401
    test_return_skips_a_function_whose_caller_copes,  # noqa: F401
    test_set_is_switched_off_and_on_again_under_load,  # noqa: F401
    test_terminate_ends_the_server_upon_set,  # noqa: F401
)
from .test_masks import (  # noqa: F401
    test_a_mask_hidden_behind_a_temporary_one_is_repaired,
    test_a_mask_in_the_frame_of_a_handler_is_put_back,
    test_a_mask_that_comes_back_with_the_return_from_a_handler_is_repaired,
    test_a_sigtrap_from_outside_shows_no_more_than_without_dynacut,
    test_an_undo_brings_sigtraps_action_back_to_the_last_bit,
    test_threads_and_handlers_that_block_sigtrap_survive_hits_and_get_their_masks_back,
    test_threads_made_by_threads_that_block_sigtrap_survive_hits,
    test_traps_of_the_program_itself_reach_its_own_handler,
    test_vector_and_floating_point_registers_survive,
)
from .test_offline import text_of
from .test_pages import test_pages_go_and_come_back_under_load  # noqa: F401
from .test_refusals import (  # noqa: F401
    test_a_seccomp_filter,
    test_a_stopped_process_stays_stopped,
    test_a_traced_process_belongs_to_its_tracer,
)
from .test_scope import (  # noqa: F401
    plan,
    test_a_block_that_a_thread_will_return_into_is_not_overwritten,
    test_a_change_that_is_refused_in_the_end_has_not_acted_meanwhile,
    test_a_refused_block_leaves_earlier_features_in_force,
    test_blocks_under_load_are_overwritten_and_put_back_whole,
    test_every_byte_of_a_block_is_overwritten_and_comes_back,
)
from .test_threads import (  # noqa: F401
    test_a_program_that_waits_in_io_uring_and_the_kernels_threads_in_it,
    test_a_tree_is_changed_as_one,
    test_a_vfork_parent_is_refused_and_goes_on_afterwards,
    test_forked_children_inherit_the_patch_and_count_for_themselves,
    test_no_wait_ends_early_or_with_eintr,
    test_no_wait_ends_when_another_thread_cannot_be_stopped,
    test_sixty_four_busy_threads,
    test_threads_come_and_go_meanwhile,
)

_BY_GDBSERVER_TOO = (
    "test_a_block_that_a_thread_will_return_into_is_not_overwritten",
    "test_a_mask_in_the_frame_of_a_handler_is_put_back",
    "test_a_mask_that_comes_back_with_the_return_from_a_handler_is_repaired",
    "test_a_thousand_times_off_and_on_under_load",
    "test_a_vfork_parent_is_refused_and_goes_on_afterwards",
    "test_both_engines_leave_the_same_bytes",
    "test_return_skips_a_function_whose_caller_copes",
    "test_set_is_switched_off_and_on_again_under_load",
    "test_terminate_ends_the_server_upon_set",
    "test_threads_and_handlers_that_block_sigtrap_survive_hits_and_get_their_masks_back",
    "test_vector_and_floating_point_registers_survive",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """By which ways a test goes."""
    if "dynacut" in metafunc.fixturenames:
        ways = ["gdb", "gdbserver"] if metafunc.function.__name__ in _BY_GDBSERVER_TOO else ["gdb"]
        metafunc.parametrize("dynacut", ways, indirect=True)


@pytest.fixture
def dynacut(request: pytest.FixtureRequest) -> Iterator[Dynacut]:
    """Every `live` command of a test goes by gdb."""
    if request.param == "gdb":
        yield GdbDynacut()
        return
    with GdbServer("--multi") as server:
        yield GdbDynacut(server)


@pytest.fixture(autouse=True)
def live_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that are run without `dynacut` go by gdb on this machine."""
    monkeypatch.setattr(test_kill, "live_options", GdbDynacut().options)


@pytest.fixture
def rounds() -> Rounds:
    """Few."""
    return lambda count: range(min(3, max(1, count // 5)))


@pytest.mark.parametrize("scope", ["entry", "block"])
def test_both_engines_leave_the_same_bytes(dynacut: Dynacut, scope: str) -> None:
    """On one process: patched by gdb, taken back by gdb, and patched by ptrace."""
    with Redis() as redis:
        target = ("live", "--pid", redis.pid)
        untouched = bytes_of(redis.pid)
        dynacut.json(*target, *SET_TO_ERROR, "--scope", scope)
        by_gdb = bytes_of(redis.pid)
        dynacut.json(*target, "--undo")
        assert bytes_of(redis.pid)[0] == untouched[0]
        Dynacut().json(*target, *SET_TO_ERROR, "--scope", scope)
        assert bytes_of(redis.pid) == by_gdb


def bytes_of(pid: int) -> tuple[dict[int, bytes], object]:
    """The code of a process, and what its table says of features, sites, and masks."""
    with Process(pid) as process:
        found = find_region(process)
        table = found.table if found else None
        masks = sorted((repair.kind, repair.id, repair.mask) for repair in table.repairs) if table else []
        return text_of(process), table and (table.features, table.sites, masks, table.previous, table.observed)
